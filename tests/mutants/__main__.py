"""Change the code in small ways and see whether the unit tests notice: `python -m tests.mutants [--group NAME ...]`.

Writes build/mutants/report.json and report.txt about the groups asked for. Fails if in any of them fewer than 85 % of
the mutants that change behaviour are killed, if nobody said why one of them survives, or if survivors.toml names what
does not survive. Groups and their tests are in groups.toml; mutmut does the work.
"""

from __future__ import annotations

import argparse
import os
import sys

from tests.mutants import outcome, report, survivors
from tests.mutants.run import BUILD, last, run
from tests.mutants.stage import ROOT, groups
from tests.mutants.survivors import Score


def main() -> None:
    """Run the groups asked for, one after the other; exit 1 if something is to be done about one of them."""
    known = groups()
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--group", action="append", choices=sorted(known), help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time (default: cores)")
    parser.add_argument("--keep", action="store_true", help="judge the last runs' mutants again; run none")
    options = parser.parse_args()
    entries = survivors.listed(known.values())
    scores: list[Score] = []
    for name in options.group or known:
        group = known[name]
        kept = last(group) if options.keep else run(group, options.jobs)
        scores.append(survivors.judge(group, kept, outcome.read(BUILD / name), entries))
        print(report.summary(scores[-1]), flush=True)  # noqa: T201
    report.write(BUILD, scores)
    print(f"survivors, timeouts and the figures: {(BUILD / 'report.txt').relative_to(ROOT)}, report.json")  # noqa: T201
    if faults := [fault for score in scores for fault in report.faults(score)]:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
