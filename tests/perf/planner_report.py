"""`make planner-report`: how far the planner's predictions are from this machine, and how fast the simulator is.

    python -m tests.perf.planner_report [--fresh] [--quick]

Measures a grid of prompt lengths, output lengths and clients on a real local cluster with the demo model, fits the
simulator on half of it, predicts the other half, and simulates 10^6 requests on 1,000 workers meanwhile. Writes
build/bench/planner.json and the table in docs/planner.md. Finished cells are kept in build/bench/planner-cells.json and
not measured again, unless `--fresh`. The machine must be quiet while cells are measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace_planner.validation import (
    METRICS,
    Cell,
    calibrate,
    default_grid,
    first_guess,
    is_held_out,
    judge,
    median_error,
    table,
)
from headrace_planner.validation_cluster import measure_grid
from rich.console import Console

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build" / "bench" / "planner.json"
CELLS = ROOT / "build" / "bench" / "planner-cells.json"
DOCS = ROOT / "docs" / "planner.md"
BEGIN, END = "<!-- validation: begin -->", "<!-- validation: end -->"
MILLION_SIM = [sys.executable, "-m", "headrace_planner.sim_million"]

console = Console()


def main() -> None:
    """Measure, fit, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure every cell again")
    parser.add_argument("--quick", action="store_true", help="a small grid, 20,000 requests in place of 10^6")
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model", help="checkpoint to serve")
    options = parser.parse_args()
    if options.fresh:
        CELLS.unlink(missing_ok=True)
    cells = [Cell(isl, 24, c) for isl in (64, 256) for c in (1, 4, 8)] if options.quick else default_grid()
    measured = measure_grid(options.model, cells, CELLS, cell_s=1.5 if options.quick else 4.0, report=console.print)

    count = 20_000 if options.quick else 1_000_000
    million = subprocess.Popen([*MILLION_SIM, str(count)], stdout=subprocess.PIPE, text=True)
    began_s = time.monotonic()
    with console.status("fitting"):
        to_fit = [m for index, m in enumerate(measured) if not is_held_out(index, m.cell)]
        fitted = calibrate(to_fit, first_guess(to_fit))
        rows = judge(fitted, measured)
    console.print(f"fitted {len(to_fit)} cells in {time.monotonic() - began_s:.0f} s")
    report: dict[str, Any] = {f"{_short(metric)}_median_error": median_error(rows, metric) for metric in METRICS}
    report |= {
        "num_held_out": sum(row.is_held_out for row in rows),
        "machine": platform.processor() or platform.machine(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    # What is known is written at once: the simulation may take minutes more.
    _write(report, table(rows), to_docs=not options.quick)
    with console.status(f"simulating {count} requests on 1,000 workers"):
        output, _ = million.communicate()
    sim: dict[str, Any] = json.loads(output)
    report |= {"sim_seconds_for_1e6": sim["wall_s"] * 1_000_000 / count, "simulated": sim}
    console.print(_write(report, table(rows), to_docs=not options.quick), soft_wrap=True)


def _write(report: dict[str, Any], rows: str, *, to_docs: bool) -> str:
    """Write the report so far as JSON and, if wanted, as the table in the docs; return the text."""
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    text = _text(report, rows)
    if to_docs:
        _write_docs(text)
    return text


def _short(metric: str) -> str:
    return metric.removesuffix("_s")


def _text(report: dict[str, Any], rows: str) -> str:
    errors = ", ".join(f"{name} {report[f'{name}_median_error']:.1%}" for name in ("ttft", "itl", "throughput"))
    return (
        f"Median error of the held-out cells: {errors}. Measured {report['at'][:10]}, CPU, demo model, one prefill "
        f"and one decode worker of one thread each. 10^6 requests on 1,000 workers: {_sim_text(report)}.\n\n{rows}"
    )


def _sim_text(report: dict[str, Any]) -> str:
    return f"{report['sim_seconds_for_1e6']:.0f} s" if "sim_seconds_for_1e6" in report else "not measured"


def _write_docs(text: str) -> None:
    """Put the table between its marks."""
    page = DOCS.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
