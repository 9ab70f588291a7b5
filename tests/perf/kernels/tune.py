"""`make tune`: time every family's candidate configurations on the GPU at hand and keep the best.

    python -m tests.perf.kernels.tune [--family NAME]... [--key KEY]... [--seconds N] [--jobs N] [--json PATH]
    python -m tests.perf.kernels.tune --dry-run --family mla_decode

Writes `tuned/<GPU>.json` beside `headrace_kernels.gpu.configs`, which reads it when kernels are launched on such a GPU:
for each family and key the configuration, its time, the number of candidates, the date and the versions. Each key is
written as soon as its candidates are timed, or as many of them as `--seconds` left time for; what was not tuned this
time keeps what the file had. Nothing is tuned while serving.

The candidates of a key are compiled first, several at a time; those that do not compile, exceed what a multiprocessor
has or spill more than a few registers are refused. The rest are timed in a process of their own: a candidate that hangs
or crashes costs itself alone. `--dry-run` needs no GPU: it compiles for sm_90 and says what would be timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from headrace_kernels.gpu.configs import tuned_path
from rich.console import Console

from tests.perf.in_turn import Limits
from tests.perf.kernels.harness import NoGpuError, families, require_gpu
from tests.perf.kernels.trials import Trial, best, compiled, entry, keep, timed

_EACH_S = 60.0

console = Console(soft_wrap=True)


def main() -> int:
    """Tune what the options name; return 0, 1 if a key has no working candidate, 2 if nothing could be tried."""
    options = _options()
    try:
        wanted = wanted_cases(options.family, options.key)
        gpu = "" if options.dry_run else require_gpu()
    except (ValueError, NoGpuError) as error:
        console.print(str(error), markup=False, style="red")
        return 2
    limits = Limits.begin(_EACH_S, options.seconds)
    if options.dry_run:
        return try_all(wanted, options.jobs, limits)
    return tune_all(wanted, gpu, options.json or tuned_path(gpu), options.jobs, limits)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(families("tuning"))
    parser.add_argument("--family", choices=known, action="append", help="only this one; may be repeated")
    parser.add_argument("--key", action="append", help="only this key; may be repeated; a wrong one lists them")
    parser.add_argument("--seconds", type=float, metavar="N", help="begin no candidate after so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="compilers (default: CPUs)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write there, not where the launchers read")
    parser.add_argument("--dry-run", action="store_true", help="compile only, on any machine")
    return parser.parse_args()


def wanted_cases(names: Sequence[str] | None, keys: Sequence[str] | None) -> list[tuple[str, int]]:
    """Return the tuning cases with these keys of these families, by family and place in its `tuning()`; None: all.

    Raises:
        ValueError: none of the families has one of the keys; says which keys they have.
    """
    listed = {family: make() for family, make in families("tuning").items() if family in (names or [family])}
    known = [f"{family}: {key}" for family, cases in listed.items() for _, key, _, _ in cases]
    for wanted in keys or []:
        if not any(key == wanted for cases in listed.values() for _, key, _, _ in cases):
            raise ValueError("\n  ".join([f"there is no key {wanted!r} to tune; there are", *known]))
    return [
        (family, index)
        for family, cases in listed.items()
        for index, (_, key, _, _) in enumerate(cases)
        if key in (keys or [key])
    ]


def tune_all(wanted: Sequence[tuple[str, int]], gpu: str, path: Path, num_processes: int, limits: Limits) -> int:
    """Tune cases, by family and place in its `tuning()`, and write each to `path`; return how the command ends."""
    num_failed = 0
    for number, (family, index) in enumerate(wanted):
        key = families("tuning")[family]()[index][1]
        told = f"{family} {key}"
        if not limits.left_s():
            console.print(f"no time left for {len(wanted) - number} keys, from {told} on", markup=False, style="red")
            return 1
        trials = timed(family, index, compiled(family, index, num_processes, limits), limits)
        try:
            found = entry(best(trials))
        except ValueError as error:
            console.print(f"{told}: {error}", markup=False, style="red")
            num_failed += 1
            continue
        keep(path, gpu, family, key, found)
        console.print(
            f"{told}: {found['us']:.1f} µs with {found['config']}, {found['num_ran']} of {found['num_candidates']} "
            f"timed{first_refused(trials)}",
            markup=False,
        )
    return 1 if num_failed else 0


def try_all(wanted: Sequence[tuple[str, int]], num_processes: int, limits: Limits) -> int:
    """Compile the candidates of cases and say which would be timed; return 1 if none of a key would."""
    num_failed = 0
    for family, index in wanted:
        trials = compiled(family, index, num_processes, limits)
        num_good = sum(not trial.error for trial in trials)
        num_failed += not num_good
        told = f"{family} {families('tuning')[family]()[index][1]}"
        console.print(f"{told}: {num_good} of {len(trials)} would be timed{first_refused(trials)}", markup=False)
    return 1 if num_failed else 0


def first_refused(trials: Sequence[Trial]) -> str:
    """Return the first candidate that has no time and why, to be added to a line."""
    return next((f"; refused: {dict(trial.config)}: {trial.error}" for trial in trials if trial.error), "")


if __name__ == "__main__":
    sys.exit(main())
