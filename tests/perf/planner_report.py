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
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace_planner.machine_use import machine_use
from headrace_planner.validation import (
    MAX_OTHERS_SHARE,
    METRICS,
    Cell,
    Row,
    Trial,
    default_grid,
    is_held_out,
    median_error,
    outcome,
    table,
)
from headrace_planner.validation_cluster import measure_rounds
from headrace_planner.validation_fit import Fitted, fit, predict
from rich.console import Console

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build" / "bench" / "planner.json"
TRIALS = ROOT / "build" / "bench" / "planner-trials.jsonl"
DOCS = ROOT / "docs" / "planner.md"
MOST_ERROR = 0.15
"""Median error on held-out cells above which the command ends with 1."""
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
    report, rows = _judge(cells, trials)
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


def too_far(report: dict[str, Any]) -> list[str]:
    """Return what is wrong with a report: each metric whose median error on held-out cells is above `MOST_ERROR`."""
    errors = {metric: report[f"{_short(metric)}_median_error"] for metric in METRICS}
    return [
        f"{_short(metric)} {error:.1%} on held-out cells, above {MOST_ERROR:.0%}"
        for metric, error in errors.items()
        if not error <= MOST_ERROR
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure every trial again")
    parser.add_argument("--quick", action="store_true", help="a small grid, 20,000 requests in place of 10^6")
    parser.add_argument("--rounds", type=int, default=4, help="trials of each cell")
    parser.add_argument("--skip-simulation", action="store_true", help="keep the last time of 10^6 requests")
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model", help="checkpoint to serve")
    return parser.parse_args()


def _judge(cells: Sequence[Cell], trials: Sequence[Trial]) -> tuple[dict[str, Any], list[Row]]:
    """Fit on half of the cells; return the errors and every cell's line."""
    held_out = {cell for index, cell in enumerate(cells) if is_held_out(index, cell)}
    fitted = fit([trial for trial in trials if trial.cell not in held_out])
    rows = [_row(fitted, cell, trials, is_held_out=cell in held_out) for cell in cells]
    report: dict[str, Any] = {f"{_short(metric)}_median_error": median_error(rows, metric) for metric in METRICS}
    for metric in METRICS:
        report[f"fitted_{_short(metric)}_median_error"] = median_error(rows, metric, held_out=False)
    report |= {
        "num_held_out": len(held_out),
        "num_trials": len(trials),
        "num_discarded": sum(trial.num_discarded for trial in trials),
        "num_disturbed": sum(trial.is_disturbed for trial in trials),
        "num_unwatched": sum(trial.others_share is None for trial in trials),
        "fitted": asdict(fitted),
        "machine": platform.processor() or platform.machine(),
        "at": datetime.fromtimestamp(TRIALS.stat().st_mtime, UTC).isoformat(timespec="seconds"),
    }
    return report, rows


def _last_simulation() -> dict[str, Any]:
    """Return what an earlier report says of 10^6 requests, to stand until it is simulated again."""
    if not REPORT.is_file():
        return {}
    last: dict[str, Any] = json.loads(REPORT.read_text())
    return {key: last[key] for key in ("sim_seconds_for_1e6", "simulated") if key in last}


def _row(fitted: Fitted, cell: Cell, trials: Sequence[Trial], *, is_held_out: bool) -> Row:
    """Predict a cell's trials and put them beside what was measured."""
    measured = [trial for trial in trials if trial.cell == cell]
    num_requests = sum(len(trial.requests) - cell.concurrency for trial in measured)
    return Row(
        cell,
        is_held_out,
        num_requests,
        measured=outcome(cell, [trial.requests for trial in measured]),
        predicted=predict(fitted, cell, [trial.round for trial in measured]),
    )


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
    held_out, fitted = (
        ", ".join(f"{_short(metric)} {report[f'{kind}{_short(metric)}_median_error']:.1%}" for metric in METRICS)
        for kind in ("", "fitted_")
    )
    return (
        f"Median error of the held-out cells: {held_out}; of the fitted ones: {fitted}. Measured {report['at'][:10]} "
        f"in {report['num_rounds']} rounds, CPU, demo model, one prefill and one decode worker of one thread each. "
        f"{_others_text(report)} "
        f"10^6 requests on 1,000 workers: {_sim_text(report)}.\n\n{rows}"
    )


def _others_text(report: dict[str, Any]) -> str:
    """Say what other programs did to the trials."""
    if report["num_unwatched"] == report["num_trials"]:
        return "What other programs used meanwhile is not known."
    text = (
        f"{report['num_trials']} trials count; {report['num_discarded']} were discarded and taken again, because other "
        f"programs used over {MAX_OTHERS_SHARE:.0%} of the machine meanwhile"
    )
    if report["num_disturbed"]:
        text += f"; {report['num_disturbed']} are counted although they did, each the best of several"
    if report["num_unwatched"]:
        text += f"; of {report['num_unwatched']} earlier ones it is not known"
    return f"{text}."


def _sim_text(report: dict[str, Any]) -> str:
    if "sim_seconds_for_1e6" not in report:
        return "not measured"
    others = report["simulated"].get("others_share")
    busy = f" while other programs used {others:.0%} of the machine" if others and others > MAX_OTHERS_SHARE else ""
    return f"{report['sim_seconds_for_1e6']:.0f} s{busy}"


def _write_docs(text: str) -> None:
    """Put the table between its marks."""
    page = DOCS.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
