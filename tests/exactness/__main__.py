"""Try exact numerics on many random cases of every family and type, in as many processes as there are cores.

    python -m tests.exactness --cases 10000
    python -m tests.exactness --family v3 --dtype bfloat16 --first 4711 --cases 1    # a case that differed, again

Writes build/exactness.json. Fails if a case differs, and names the first few.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import track

from tests.exactness.cases import DTYPES, FAMILIES, differing
from tests.perf.machine import machine

_REPORT = Path("build/exactness.json")
_SEEDS_AT_ONCE = 25
_NAMED = 5


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of each family and type")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.cases)
    found_by_name: dict[str, dict[str, object]] = {}
    num_failed = 0
    # Not forked: this process may have threads.
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(options.processes) as pool,
    ):
        for family in options.family or FAMILIES:
            for dtype in options.dtype or DTYPES:
                begin = time.monotonic()
                run = functools.partial(differing, family, dtype, Path(folder))
                parts = [seeds[i : i + _SEEDS_AT_ONCE] for i in range(0, len(seeds), _SEEDS_AT_ONCE)]
                found = pool.imap_unordered(run, parts)
                shown = track(found, f"{family} {dtype}", total=len(parts), disable=not sys.stderr.isatty())
                failed = sorted(seed for part in shown for seed in part)
                seconds = round(time.monotonic() - begin, 1)
                print(f"{family} {dtype}: {len(seeds)} cases in {seconds} s, {len(failed)} differ {failed[:_NAMED]}")  # noqa: T201
                sys.stdout.flush()
                found_by_name[f"{family} {dtype}"] = {"tried": len(seeds), "s": seconds, "differ": failed}
                num_failed += len(failed)
    _REPORT.parent.mkdir(exist_ok=True)
    _REPORT.write_text(json.dumps({"machine": machine(), "cases": found_by_name}, indent=1) + "\n")
    sys.exit(num_failed > 0)


if __name__ == "__main__":
    _main()
