"""What `make planner-report` says of its trials: errors, each cell's line, the text of docs/planner.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from headrace_planner.validation import (
    MAX_OTHERS_SHARE,
    METRICS,
    Cell,
    Row,
    Trial,
    is_held_out,
    median_error,
    outcome,
)
from headrace_planner.validation_fit import Fitted, fit, predict

MOST_ERROR = 0.15
"""Median error on held-out cells above which the command ends with 1."""


def judge(cells: Sequence[Cell], trials: Sequence[Trial]) -> tuple[dict[str, Any], list[Row]]:
    """Fit on half of the cells; return the errors and every cell's line."""
    held_out = {cell for index, cell in enumerate(cells) if is_held_out(index, cell)}
    fitted = fit([trial for trial in trials if trial.cell not in held_out])
    rows = [row_of(fitted, cell, trials, is_held_out=cell in held_out) for cell in cells]
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
    }
    return report, rows


def row_of(fitted: Fitted, cell: Cell, trials: Sequence[Trial], *, is_held_out: bool) -> Row:
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


def too_far(report: dict[str, Any]) -> list[str]:
    """Return what is wrong with a report: each metric whose median error on held-out cells is above `MOST_ERROR`."""
    errors = {metric: report[f"{_short(metric)}_median_error"] for metric in METRICS}
    return [
        f"{_short(metric)} {error:.1%} on held-out cells, above {MOST_ERROR:.0%}"
        for metric, error in errors.items()
        if not error <= MOST_ERROR
    ]


def text_of(report: dict[str, Any], rows: str) -> str:
    """Return what the docs say of a report, with its table; `report` also says when it was measured, and in rounds."""
    held_out, fitted = (
        ", ".join(f"{_short(metric)} {report[f'{kind}{_short(metric)}_median_error']:.1%}" for metric in METRICS)
        for kind in ("", "fitted_")
    )
    return (
        f"Median error of the held-out cells: {held_out}; of the fitted ones: {fitted}. Measured {report['at']} "
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
    if not report["simulated"]:
        return "not measured"
    others = report["simulated"].get("others_share")
    busy = f" while other programs used {others:.0%} of the machine" if others and others > MAX_OTHERS_SHARE else ""
    return f"{report['simulated']['seconds_for_1e6']:.0f} s{busy}"


def _short(metric: str) -> str:
    return metric.removesuffix("_s")
