"""Change the code in small ways and see whether the unit tests notice: `python -m tests.mutants [--group NAME ...]`.

Writes build/mutants/report.json and report.txt. Fails if in any group fewer than 85 % of the mutants that change
behaviour are killed. Groups and their tests are in groups.toml, accepted survivors in survivors.toml; mutmut does the
work.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.mutants import outcome, report, survivors
from tests.mutants.stage import ROOT, Group, groups, stage
from tests.mutants.survivors import Score

_BUILD = ROOT / "build" / "mutants"


def main() -> None:
    """Run the groups asked for, one after the other; exit 1 if one of them has too many survivors."""
    known = groups()
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--group", action="append", choices=sorted(known), help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time (default: cores)")
    parser.add_argument("--keep", action="store_true", help="judge the last run's mutants again; run none")
    options = parser.parse_args()
    scores: list[Score] = []
    for name in options.group or known:
        folder = _BUILD / name
        begun = time.monotonic()
        if not options.keep:
            _run(known[name], folder, options.jobs)
        score = survivors.judge(name, outcome.read(folder), survivors.listed())
        print(f"{report.summary(score)}  {time.monotonic() - begun:.0f} s", flush=True)  # noqa: T201
        scores.append(score)
    report.write(_BUILD, scores)
    print(f"survivors, timeouts and the figures: {(_BUILD / 'report.txt').relative_to(ROOT)}, report.json")  # noqa: T201
    failing = [score.group for score in scores if score.share < report.LEAST_SHARE]
    if failing:
        sys.exit(f"fewer than {report.LEAST_SHARE:.0%} killed in {', '.join(failing)}: see the report")


def _run(group: Group, folder: Path, jobs: int) -> None:
    """Let mutmut make and run the group's mutants in `folder`; its words go to a log beside it."""
    stage(group, folder)
    log = folder.with_suffix(".log")
    path = os.pathsep.join(filter(None, (str(_BUILD / "tool"), os.environ.get("PYTHONPATH"))))
    # Hashes of strings vary from process to process: the order of sets would, too.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(jobs)]
    with log.open("wb") as output:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output, check=False)
    if done.returncode:
        sys.exit(f"mutmut failed on {group.name}, exit status {done.returncode}: see {log.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
