"""One command for a day with a GPU, which may be a quarter of an hour: what it finds is kept as it is found.

    python -m tests.perf.gpu_day first  [--seconds 450] [--out DIR]
    python -m tests.perf.gpu_day second [--seconds 190] [--parity TEST]... [--family NAME]... [--tune WHAT]...
    python -m tests.perf.gpu_day first --dry-run

first, in the order of what is worth most:
  parity    every kernel's tests on the GPU, in several processes if pytest-xdist is there; beside them
  compile   what the benchmarks launch is compiled on the other cores, for what follows to find in Triton's cache
  step      the decode step of a V2-Lite-shaped network, captured, beside its floor: batches 1, 32 and 128
  kernels   every kernel beside its floor, decode's first, each family in a process of its own
  tokens    greedy tokens of small checkpoints beside transformers'
  profile   counters of five kernels under ncu, where there is one
second, for what the first run showed:
  parity    the files or tests of --parity again
  kernels   those of --family, all if none is named, beside torch's and other projects'
  tune      for each --tune FAMILY or FAMILY:KEY, the fastest configurations

It runs from a checkout: nothing is installed or fetched, but what requirements.lock names must be importable. Each part
may take its share of what is left of --seconds; then it is ended with every process that it started, and so it is on
Ctrl-C and SIGTERM. DIR gets summary.txt, parts.jsonl with how each part ended, and a log of each part; parity.jsonl,
compile.jsonl and kernels.jsonl, with a line for each test, launch and case as it comes; engine.json and tuned.json.
--dry-run tries all of it on a CPU, as small as it goes and with kernels interpreted: its times mean nothing.

Exit code: 0 every part passed; 1 a part failed or was cut off; 2 the options are wrong; 3 nothing could start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from threading import Event

from tests.perf.gpu_day import machine
from tests.perf.gpu_day.findings import findings
from tests.perf.gpu_day.parts import Choice, Part, first, second
from tests.perf.gpu_day.run import PASSED, Day, Outcome, interruption

_SECONDS = {"first": 450.0, "second": 190.0}
_OUT = machine.ROOT / "build" / "gpu-day"
_CHECK_S = 60.0
NOTHING_STARTED = 3


def main(argv: list[str] | None = None) -> int:
    """Run a mode's parts; return the exit code that the module's docstring lists."""
    options = _options(argv)
    seconds = options.seconds or _SECONDS[options.mode]
    out = (options.out or _OUT / f"{options.mode}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    if (out / "summary.txt").exists():
        sys.stderr.write(f"{out} has the results of another run: name another folder with --out\n")
        return NOTHING_STARTED
    out.mkdir(parents=True, exist_ok=True)
    with interruption() as interrupted:
        return _run(options, out, seconds, interrupted)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.perf.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=sorted(_SECONDS), help="which parts")
    parser.add_argument("--seconds", type=float, metavar="N", help="for all parts together (default: 450, second: 190)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="a folder for the results (default: below build/gpu-day)"
    )
    parser.add_argument("--family", action="append", default=[], metavar="NAME", help="measure only it; repeatable")
    parser.add_argument(
        "--parity", action="append", default=[], metavar="TEST", help="run only this file or test of parity"
    )
    parser.add_argument("--tune", action="append", default=[], metavar="WHAT", help="FAMILY or FAMILY:KEY; second only")
    parser.add_argument("--dry-run", action="store_true", help="try it on a CPU, as small as it goes")
    options = parser.parse_args(argv)
    if options.tune and options.mode == "first":
        parser.error("--tune is for the second run, when parity has passed")
    if options.seconds is not None and options.seconds <= 0:
        parser.error(f"--seconds {options.seconds:g}: must be above 0")
    return options


def _run(options: argparse.Namespace, out: Path, seconds: float, interrupted: Event) -> int:
    say = _Summary(out)
    environment = environment_of(os.environ)
    missing = machine.missing_modules()
    if missing:
        say(f"not importable here: {', '.join(missing)}")
    if not options.dry_run and not _has_gpu(out, min(seconds, _CHECK_S), environment, interrupted, say):
        return NOTHING_STARTED
    choice = (Choice.dry if options.dry_run else Choice)(options.family, options.parity, options.tune)
    day = Day(machine.ROOT, out, seconds, environment, interrupted)
    bad: list[Outcome] = []
    with contextlib.closing(day.run({"first": first, "second": second}[options.mode](out, choice))) as outcomes:
        for outcome in outcomes:
            with (out / "parts.jsonl").open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            say(f"-- {told(outcome)}; {day.left_s():.0f} s left")
            bad += [] if outcome.is_good else [outcome]
    for line in (*findings(out), machine.card()):
        say(line)
    say(f"not passed: {', '.join(f'{outcome.name} ({outcome.status})' for outcome in bad) or 'nothing'}")
    return 1 if bad else 0


def _has_gpu(out: Path, seconds: float, environment: Mapping[str, str], interrupted: Event, say: _Summary) -> bool:
    """Ask in a process that may hang: so does a driver at times."""
    part = Part("the GPU check", 1, (sys.executable, "-m", "tests.perf.gpu_day.machine"), "machine.log")
    (outcome,) = Day(machine.ROOT, out, seconds, environment, interrupted).run([(part,)])
    said = (out / "machine.log").read_text().splitlines()[1:]
    say("\n".join([*said[-5:], machine.card()]).strip())
    if outcome.status != PASSED:
        say(f"nothing could start: {told(outcome)}; --dry-run needs no GPU")
    return outcome.status == PASSED


def told(outcome: Outcome) -> str:
    """Return how a part ended, in words."""
    if outcome.exit_code is None:
        return f"{outcome.name} {outcome.status}"
    code = f" with exit code {outcome.exit_code}" if outcome.exit_code else ""
    return f"{outcome.name} {outcome.status}{code} in {outcome.seconds:.0f} of {outcome.limit_s:.0f} s"


def environment_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what parts get: this checkout's packages before whatever PYTHONPATH names, and nothing from a network.

    Triton's interpreter is for the parts of a dry run that ask for it.
    """
    # Parts run in the checkout's folder, wherever this command was given.
    given = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {
        **{name: value for name, value in environment.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join([*map(str, machine.source_roots()), *given]),
        "PYTHONUNBUFFERED": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "COLUMNS": "160",
    }


class _Summary:
    """Writes lines to the terminal and to summary.txt, at once."""

    def __init__(self, out: Path) -> None:
        self._path = out / "summary.txt"

    def __call__(self, line: str) -> None:
        if not line:
            return
        with self._path.open("a") as file:
            file.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
