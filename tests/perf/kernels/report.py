"""`make kernels-bench`: the ceilings of the GPU at hand, then every kernel beside its floor and its peers.

    python -m tests.perf.kernels.report [--family NAME]... [--no-parity] [--no-peers] [--seconds N] [--json PATH]
    python -m tests.perf.kernels.report --dry-run --family rms_norm
    python -m tests.perf.kernels.report --floors

Runs the parity tests on the GPU first and measures the families that pass: the speed of a wrong kernel is of no use.
Writes build/bench/kernels-gpu.json and, if no option left anything out, the table in docs/kernels.md. `--no-parity`
takes the tests as passed, where they have just run. `--floors` needs no GPU: it writes the table with the floors that
an H200's assumed ceilings give and without times. `--dry-run` needs none either: it tries the command on the smallest
cases, interpreted on the CPU; its times mean nothing.

Each family has a process of its own, and what follows a failure that leaves it unusable another. A case that hangs is
cut off and named. A row is written to the report's .jsonl as soon as it is measured: who ends the command early, or
whose `--seconds` are over, has what was found so far. What matters most for a decode step is measured first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from headrace_kernels.aot.report import put_between
from rich.console import Console

from tests.perf import report_file
from tests.perf.in_turn import Limits
from tests.perf.kernels import ceilings as ceilings_of_gpu
from tests.perf.kernels import parity
from tests.perf.kernels.ceilings import H200_ASSUMED, Ceilings
from tests.perf.kernels.harness import NoGpuError, families, require_gpu, versions
from tests.perf.kernels.measure import How, cases_of, in_order, measure_family
from tests.perf.kernels.parity import Verdict
from tests.perf.kernels.rows import Row, as_json, table, unmeasured

ROOT = Path(__file__).parents[3]
REPORT = ROOT / "build" / "bench" / "kernels-gpu.json"
DRY_REPORT = ROOT / "build" / "bench" / "kernels-dry-run.json"
DOCS = ROOT / "docs" / "kernels.md"
MARKER = "kernels-gpu"
_EACH_S = 45.0
_DRY_GPU = "none: interpreted on a CPU, times mean nothing"

console = Console(soft_wrap=True)


def main() -> int:
    """Measure everything the options name; return 0, 1 if a kernel is wrong or fails, 2 if nothing could be tried."""
    options = _options()
    if options.floors:
        return _write_floors()
    if options.dry_run:
        # Read by triton when a process defines its first kernel, and those that measure are yet to come.
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        gpu = _DRY_GPU if options.dry_run else require_gpu()
    except NoGpuError as error:
        console.print(str(error), style="red")
        return 2
    limits = Limits.begin(_EACH_S, options.seconds)
    names = in_order(options.family or families("cases"))
    verdict = Verdict(frozenset()) if options.no_parity or options.dry_run else _parity_of(names)
    ceilings = _ceilings(options.dry_run)
    heading = {"GPU": gpu, "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")} | versions()
    path = options.json or (DRY_REPORT if options.dry_run else REPORT)
    lines = path.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text(json.dumps(heading | {"ceilings": asdict(ceilings)}) + "\n")
    rows: list[Row] = []
    for row in _measure(names, verdict, ceilings, How(not options.no_peers, options.dry_run), limits):
        with lines.open("a") as file:
            file.write(json.dumps(as_json([row])[0]) + "\n")
        told = row.error or f"{row.us:.1f} µs, floor {row.floor_us:.1f}"
        console.print(f"{row.family} {row.shape}: {told}; peers {row.peers}", markup=False)
        rows.append(row)
    rows = as_listed(rows)
    report_file.merge(path, {**heading, "ceilings": asdict(ceilings), "rows": as_json(rows)})
    if not (options.family or options.no_parity or options.dry_run or options.seconds or options.json):
        DOCS.write_text(put_between(DOCS.read_text(), MARKER, table(rows, ceilings, heading)))
    console.print(table(rows, ceilings, heading), markup=False)
    console.print(f"Written to {path}.")
    return 1 if any(row.error for row in rows) or not verdict.holds else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(families("cases"))
    parser.add_argument("--family", choices=known, action="append", help="only this one; may be repeated")
    parser.add_argument("--no-parity", action="store_true", help="measure without the tests; docs/kernels.md stays")
    parser.add_argument("--no-peers", action="store_true", help="measure no other kernels of the same function")
    parser.add_argument("--seconds", type=float, metavar="N", help="begin no case after so many")
    parser.add_argument("--json", type=Path, metavar="PATH", help="report to write; docs/kernels.md stays")
    parser.add_argument("--dry-run", action="store_true", help="try the command on a CPU, interpreted")
    parser.add_argument("--floors", action="store_true", help="no measurement: write the floors, on any machine")
    return parser.parse_args()


def _ceilings(is_dry: bool) -> Ceilings:
    if is_dry:
        return H200_ASSUMED
    with console.status("measuring the GPU's ceilings …"):
        ceilings = ceilings_of_gpu.measure()
    torch.cuda.empty_cache()
    return ceilings


def _measure(names: Sequence[str], verdict: Verdict, ceilings: Ceilings, how: How, limits: Limits) -> Generator[Row]:
    for name in names:
        if name in verdict.wrong:
            empty = (unmeasured(case, ceilings) for case in cases_of(name, how))
            yield from (replace(row, error="not measured: its parity tests fail") for row in empty)
        else:
            yield from measure_family(name, ceilings, how, limits)


def as_listed(rows: Iterable[Row]) -> list[Row]:
    """Return rows in the order in which their families list the cases: what was measured first is not shown first."""
    order = [(case.family, case.shape) for make in families("cases").values() for case in make()]
    return sorted(rows, key=lambda row: order.index((row.family, row.shape)))


def _write_floors() -> int:
    cases = [case for make in families("cases").values() for case in make()]
    heading = {"GPU": "not measured: floors of an H200 at assumed ceilings"}
    rows = [unmeasured(case, H200_ASSUMED) for case in cases]
    DOCS.write_text(put_between(DOCS.read_text(), MARKER, table(rows, H200_ASSUMED, heading)))
    console.print(f"{len(rows)} floors written to {DOCS.relative_to(ROOT)}; nothing was measured.")
    return 0


def _parity_of(names: Iterable[str]) -> Verdict:
    console.print("parity on the GPU")
    verdict = parity.run(names)
    if not verdict.holds:
        told = [*sorted(verdict.wrong), *verdict.elsewhere]
        console.print(
            f"parity fails, and wrong families are not measured: {', '.join(told)}", style="red", markup=False
        )
    return verdict


if __name__ == "__main__":
    sys.exit(main())
