"""`make planner-report`: how far the planner's predictions are from this machine, and how fast the simulator is.

    python -m tests.perf.planner_report [--fresh] [--quick] [--rounds N] [--skip-simulation]

Measures a grid of prompt lengths, output lengths and clients on a real local cluster with the demo model, in rounds of
about 2.5 minutes each, fits the simulator's speeds on half of the cells, predicts the other half, and simulates 10^6
requests on 1,000 workers meanwhile. Writes build/bench/planner.json and the table in docs/planner.md. Finished trials
are kept in build/bench/planner-trials.jsonl and not measured again, unless `--fresh`. The machine must be quiet while
they are measured: a trial during which other programs used more than a tenth of it is taken again, up to three times.
Where it can't be quiet for long, ask for one round more at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from headrace_planner.machine_use import machine_use
from headrace_planner.validation import Cell, default_grid, table
from headrace_planner.validation_cluster import measure_rounds
from rich.console import Console

from tests.perf.planner_figures import TRIALS, judge, text_of, too_far

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build" / "bench" / "planner.json"
DOCS = ROOT / "docs" / "planner.md"
BEGIN, END = "<!-- validation: begin -->", "<!-- validation: end -->"
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
    trials = measure_rounds(options.model, cells, TRIALS, num_rounds=num_rounds, report=console.print)

    million, use = None, machine_use()
    if not options.skip_simulation:
        million = subprocess.Popen([*MILLION_SIM, str(count)], stdout=subprocess.PIPE, text=True)
    report, rows = judge(cells, trials)
    report |= {"num_rounds": num_rounds} | _last_simulation()
    # What is known is written at once: the simulation may take minutes more.
    text = _write(report, table(rows), to_docs=not options.quick)
    if million is not None:
        with console.status(f"simulating {count} requests on 1,000 workers"):
            output, _ = million.communicate()
        sim: dict[str, Any] = json.loads(output) | {"others_share": machine_use().others_share(use)}
        report |= {"sim_seconds_for_1e6": sim["wall_s"] * 1_000_000 / count, "simulated": sim}
        text = _write(report, table(rows), to_docs=not options.quick)
    console.print(text, soft_wrap=True)
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


def _last_simulation() -> dict[str, Any]:
    """Return what an earlier report says of 10^6 requests, to stand until it is simulated again."""
    if not REPORT.is_file():
        return {}
    last: dict[str, Any] = json.loads(REPORT.read_text())
    return {key: last[key] for key in ("sim_seconds_for_1e6", "simulated") if key in last}


def _write(report: dict[str, Any], rows: str, *, to_docs: bool) -> str:
    """Write the report so far as JSON and, if wanted, as the table in the docs; return the text."""
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    text = text_of(report, rows)
    if to_docs:
        _write_docs(text)
    return text


def _write_docs(text: str) -> None:
    """Put the table between its marks."""
    page = DOCS.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
