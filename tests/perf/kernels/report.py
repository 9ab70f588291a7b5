"""`make kernels-bench`: the ceilings of the GPU at hand, then every kernel beside its floor and its peers.

    python -m tests.perf.kernels.report [--family NAME] [--no-parity] [--floors]

Runs the parity tests on the GPU first and measures the families that pass: the speed of a wrong kernel is of no use.
Writes build/bench/kernels-gpu.json and, if every family was judged, the table in docs/kernels.md. `--no-parity` takes
the tests as passed, where they have just run; docs/kernels.md stays. `--floors` needs no GPU: it writes the table with
the floors that an H200's assumed ceilings give and without times.

Each family has a process of its own, and what follows a failure that leaves it unusable another. A row is written to
build/bench/kernels-gpu.jsonl as soon as it is measured: who ends the command early has what was found so far.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from headrace_kernels.aot.report import put_between
from rich.console import Console

from tests.perf import report_file
from tests.perf.kernels import ceilings as ceilings_of_gpu
from tests.perf.kernels import parity
from tests.perf.kernels.bench_case import BenchCase, Calls
from tests.perf.kernels.ceilings import H200_ASSUMED, Ceilings
from tests.perf.kernels.harness import (
    NoGpuError,
    families,
    is_usable,
    measure_eager_us,
    measure_us,
    require_gpu,
    versions,
)
from tests.perf.kernels.parity import Verdict
from tests.perf.kernels.peers import Adapter, load_adapters, peers_of
from tests.perf.kernels.rows import Row, as_json, fits_l2, table, unmeasured

ROOT = Path(__file__).parents[3]
REPORT = ROOT / "build" / "bench" / "kernels-gpu.json"
DOCS = ROOT / "docs" / "kernels.md"
PEERS = ROOT / ".peers"
MARKER = "kernels-gpu"

Measure = Callable[[Sequence[Callable[[], object]]], float]

console = Console(soft_wrap=True)


def main() -> int:
    """Measure everything the options name; return 0, 1 if a kernel is wrong or fails, 2 if nothing could be tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(families("cases")), help="only this one; docs/kernels.md stays")
    parser.add_argument("--no-parity", action="store_true", help="measure without the tests; docs/kernels.md stays")
    parser.add_argument("--floors", action="store_true", help="no measurement: write the floors, on any machine")
    options = parser.parse_args()
    if options.floors:
        return _write_floors()
    try:
        gpu = require_gpu()
    except NoGpuError as error:
        console.print(str(error), style="red")
        return 2
    makers = {name: make for name, make in families("cases").items() if options.family in (None, name)}
    verdict = Verdict(frozenset()) if options.no_parity else _parity_of(makers)
    with console.status("measuring the GPU's ceilings …"):
        ceilings = ceilings_of_gpu.measure()
    torch.cuda.empty_cache()
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.with_suffix(".jsonl").unlink(missing_ok=True)
    rows: list[Row] = []
    for name, make in makers.items():
        if name in verdict.wrong:
            rows += [
                replace(unmeasured(case, ceilings), error="not measured: its parity tests fail") for case in make()
            ]
        else:
            rows += _measure(make(), ceilings)
    heading = {"GPU": gpu, "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")} | versions()
    report_file.merge(REPORT, {**heading, "ceilings": asdict(ceilings), "rows": as_json(rows)})
    if options.family is None and not options.no_parity:
        DOCS.write_text(put_between(DOCS.read_text(), MARKER, table(rows, ceilings, heading)))
    console.print(table(rows, ceilings, heading), markup=False)
    console.print(f"Written to {REPORT.relative_to(ROOT)}.")
    return 1 if any(row.error for row in rows) or not verdict.holds else 0


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


def _measure(cases: list[BenchCase], ceilings: Ceilings) -> list[Row]:
    """Measure one family's cases, in as many processes as that takes."""
    rows: list[Row] = []
    while len(rows) < len(cases):
        case = cases[len(rows)]
        path = REPORT.with_suffix(".jsonl")
        num_before = len(_rows_in(path))
        exit_code = _in_process(partial(_measure_from, case.family, len(rows), ceilings, path))
        found = _rows_in(path)[num_before:]
        if not found:
            found = [replace(unmeasured(case, ceilings), error=f"fails: its process ended with {exit_code}")]
            _append(path, found[0])
        rows += found
    return rows


def _measure_from(family: str, first: int, ceilings: Ceilings, path: Path) -> None:
    """Measure a family's cases from number `first` on, to the end or until this process can measure no more."""
    adapters = load_adapters(PEERS)
    for case in families("cases")[family]()[first:]:
        row = _row(case, ceilings, adapters)
        _append(path, row)
        told = row.error or f"{row.us:.1f} µs, floor {row.floor_us:.1f}"
        console.print(f"{row.family} {row.shape}: {told}; peers {row.peers}", markup=False)
        has_failed = row.error or any(isinstance(time, str) for time in row.peers.values())
        if has_failed and not is_usable():
            return


def _in_process(run: Callable[[], object]) -> int | None:
    """Call `run` in a process that shares nothing with this one; return its exit code, negative for a signal."""
    process = multiprocessing.get_context("spawn").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


def _append(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def _rows_in(path: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _row(case: BenchCase, ceilings: Ceilings, adapters: list[Adapter]) -> Row:
    empty = unmeasured(case, ceilings)
    own, num_calls = _time(case.calls)
    peers = {name: _time(calls)[0] for name, calls in peers_of(case, adapters).items()}
    peers |= {name: _time(calls, measure_eager_us)[0] for name, calls in case.eager_peers.items()}
    if isinstance(own, str):
        return replace(empty, error=own, peers=peers)
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return replace(empty, us=own, peers=peers, is_in_l2=fits_l2(case, num_calls, l2_bytes, empty.bound))


def _time(make_calls: Calls, measure: Measure = measure_us) -> tuple[float | str, int]:
    """Return the median time and the number of buffers; in place of the time, why there is none."""
    try:
        calls = make_calls()
        return measure(calls), len(calls)
    except Exception as error:  # noqa: BLE001 - one kernel or peer that fails must not cost the others' figures
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160], 0
    finally:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
