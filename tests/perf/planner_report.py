"""`make planner-report`: how far the planner's predictions are from this machine, and how fast the simulator is.

    python -m tests.perf.planner_report [--fresh] [--quick] [--rounds N] [--skip-simulation]

Measures a grid of prompt lengths, output lengths and clients on a real local cluster with the demo model, in rounds of
about 2.5 minutes each, fits the simulator's speeds on half of the cells, predicts the other half, and simulates 10^6
requests on 1,000 workers meanwhile. Writes build/bench/planner.json, the record that CI checks (planner_record.py) and
the table in docs/planner.md. Finished trials are kept in build/bench/planner-trials.jsonl and not measured again, but
with `--fresh`. The machine must be quiet while they are measured: a trial during which other programs used more than a
tenth of it is taken again, up to three times. Where it can't be quiet for long, ask for one round more at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace_planner.machine_use import machine_use
from headrace_planner.validation import Cell, default_grid, table
from headrace_planner.validation_cluster import WORKER_OPTIONS, measure_rounds
from rich.console import Console

from tests.perf.machine import machine
from tests.perf.planner_figures import judge, text_of, too_far
from tests.perf.planner_record import RECORD, ROOT, Record, digest_of, report_of, rounded

REPORT = ROOT / "build" / "bench" / "planner.json"
TRIALS = ROOT / "build" / "bench" / "planner-trials.jsonl"
DOCS = ROOT / "docs" / "planner.md"
BEGIN, END = "<!-- validation: begin -->", "<!-- validation: end -->"
_MACHINE = ("cpu", "cpu_flags", "cores", "torch")
MILLION_SIM = [sys.executable, "-m", "headrace_planner.sim_million"]

console = Console()


def main() -> None:
    """Measure, fit, judge, write."""
    options = _options()
    if options.fresh:
        TRIALS.unlink(missing_ok=True)
    cells, num_rounds, count = default_grid(), options.rounds, 1_000_000
    if options.quick:
        cells, num_rounds, count = [Cell(i, o, c) for i in (64, 256, 1024) for o in (24, 72) for c in (1, 4)], 1, 20_000
    measured = measure_rounds(options.model, cells, TRIALS, num_rounds=num_rounds, report=console.print)
    trials = [rounded(trial) for trial in measured]

    million, use = None, machine_use()
    if not options.skip_simulation:
        million = subprocess.Popen([*MILLION_SIM, str(count)], stdout=subprocess.PIPE, text=True)
    found, rows = judge(cells, trials)
    record = Record(
        at=datetime.fromtimestamp(TRIALS.stat().st_mtime, UTC).date().isoformat(),
        num_rounds=num_rounds,
        checkpoint=digest_of(options.model),
        workers=WORKER_OPTIONS,
        machine={name: value for name, value in machine().items() if name in _MACHINE},
        simulated=Record.load().simulated if RECORD.is_file() else {},
        fitted=found["fitted"],
        trials=trials,
    )
    # What is known is written at once: the simulation may take minutes more.
    report = _write(record, found, table(rows), is_kept=not options.quick)
    if million is not None:
        with console.status(f"simulating {count} requests on 1,000 workers"):
            output, _ = million.communicate()
        simulated: dict[str, Any] = json.loads(output) | {"others_share": machine_use().others_share(use)}
        simulated["seconds_for_1e6"] = simulated["wall_s"] * 1_000_000 / count
        report = _write(replace(record, simulated=simulated), found, table(rows), is_kept=not options.quick)
    console.print(text_of(report, table(rows)), soft_wrap=True)
    if problems := too_far(report):
        sys.exit(f"error: predictions are too far off: {'; '.join(problems)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure every trial again")
    parser.add_argument("--quick", action="store_true", help="a small grid, 20,000 requests in place of 10^6")
    parser.add_argument("--rounds", type=int, default=4, help="trials of each cell")
    parser.add_argument("--skip-simulation", action="store_true", help="keep the last time of 10^6 requests")
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model", help="checkpoint to serve")
    return parser.parse_args()


def _write(record: Record, found: dict[str, Any], rows: str, *, is_kept: bool) -> dict[str, Any]:
    """Write the report so far, which is returned; if it is to be kept, also the record and the table in the docs."""
    report = report_of(record, found)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    if is_kept:
        record.save()
        _write_docs(text_of(report, rows))
    return report


def _write_docs(text: str) -> None:
    """Put the table between its marks."""
    page = DOCS.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
