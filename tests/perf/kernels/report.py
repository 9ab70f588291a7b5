"""`make kernels-bench`: the ceilings of the GPU at hand, then every kernel beside its floor and its peers.

    python -m tests.perf.kernels.report [--family NAME] [--floors]

Runs the parity tests on the GPU first and stops if one fails: the speed of a wrong kernel is of no use. Writes
build/bench/kernels-gpu.json and, if every family ran, the table in docs/kernels.md. `--floors` needs no GPU: it writes
the table with the floors that an H200's assumed ceilings give and without times.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from headrace_kernels.aot.report import put_between
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.perf import report_file
from tests.perf.kernels import ceilings as ceilings_of_gpu
from tests.perf.kernels.bench_case import BenchCase, Calls
from tests.perf.kernels.ceilings import H200_ASSUMED, Ceilings
from tests.perf.kernels.harness import NoGpuError, families, measure_us, require_gpu, versions
from tests.perf.kernels.peers import Adapter, load_adapters, peers_of
from tests.perf.kernels.rows import Row, as_json, fits_l2, table, unmeasured

ROOT = Path(__file__).parents[3]
REPORT = ROOT / "build" / "bench" / "kernels-gpu.json"
DOCS = ROOT / "docs" / "kernels.md"
PEERS = ROOT / ".peers"
PARITY = ROOT / "tests" / "parity" / "kernels"
MARKER = "kernels-gpu"

console = Console(soft_wrap=True)


def main() -> int:
    """Measure everything the options name; return 0, 1 if a kernel is wrong or fails, 2 if nothing could be tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(families("cases")), help="only this one; docs/kernels.md stays")
    parser.add_argument("--floors", action="store_true", help="no measurement: write the floors, on any machine")
    options = parser.parse_args()
    if options.floors:
        return _write_floors()
    try:
        gpu = require_gpu()
    except NoGpuError as error:
        console.print(str(error), style="red")
        return 2
    if not _parity_holds(options.family):
        console.print("The parity tests fail on this GPU: nothing was measured.", style="red")
        return 1
    cases = [c for name, make in families("cases").items() if options.family in (None, name) for c in make()]
    with console.status("measuring the GPU's ceilings …"):
        ceilings = ceilings_of_gpu.measure()
    rows = _measure(cases, ceilings, load_adapters(PEERS))
    heading = {"GPU": gpu, "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")} | versions()
    report_file.merge(REPORT, {**heading, "ceilings": asdict(ceilings), "rows": as_json(rows)})
    if options.family is None:
        DOCS.write_text(put_between(DOCS.read_text(), MARKER, table(rows, ceilings, heading)))
    console.print(table(rows, ceilings, heading), markup=False)
    console.print(f"Written to {REPORT.relative_to(ROOT)}.")
    return 1 if any(row.error for row in rows) else 0


def _write_floors() -> int:
    cases = [case for make in families("cases").values() for case in make()]
    heading = {"GPU": "not measured: floors of an H200 at assumed ceilings"}
    rows = [unmeasured(case, H200_ASSUMED) for case in cases]
    DOCS.write_text(put_between(DOCS.read_text(), MARKER, table(rows, H200_ASSUMED, heading)))
    console.print(f"{len(rows)} floors written to {DOCS.relative_to(ROOT)}; nothing was measured.")
    return 0


def _parity_holds(family: str | None) -> bool:
    of_family = PARITY / f"test_{family}.py"
    tests = of_family if family and of_family.exists() else PARITY
    console.print(f"parity on the GPU: {tests.relative_to(ROOT)}")
    return subprocess.run([sys.executable, "-m", "pytest", "-q", str(tests)], cwd=ROOT, check=False).returncode == 0


def _measure(cases: list[BenchCase], ceilings: Ceilings, adapters: list[Adapter]) -> list[Row]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("kernels", total=len(cases))
        for case in cases:
            progress.update(bar, description=f"{case.family} {case.shape}")
            rows.append(_row(case, ceilings, adapters))
            progress.advance(bar)
    return rows


def _row(case: BenchCase, ceilings: Ceilings, adapters: list[Adapter]) -> Row:
    empty = unmeasured(case, ceilings)
    own, num_calls = _time(case.calls)
    peers = {name: _time(calls)[0] for name, calls in peers_of(case, adapters).items()}
    if isinstance(own, str):
        return replace(empty, error=own, peers=peers)
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return replace(empty, us=own, peers=peers, is_in_l2=fits_l2(case, num_calls, l2_bytes, empty.bound))


def _time(make_calls: Calls) -> tuple[float | str, int]:
    """Return the median time and the number of buffers; in place of the time, why there is none."""
    try:
        calls = make_calls()
        return measure_us(calls), len(calls)
    except Exception as error:  # noqa: BLE001 - one kernel or peer that fails must not cost the others' figures
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160], 0
    finally:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
