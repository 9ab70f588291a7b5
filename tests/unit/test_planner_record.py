"""The kept run holds: today's fit and simulator predict it, the docs are of it, and it is of what is served now."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from headrace_planner.validation import (
    METRICS,
    Cell,
    Row,
    default_grid,
    is_held_out,
    median_error,
    table,
    trial_workload,
)
from headrace_planner.validation_cluster import WORKER_OPTIONS
from headrace_planner.validation_fit import Fitted, fit

from tests.perf.planner_figures import MOST_ERROR, judge, row_of, text_of, too_far
from tests.perf.planner_record import MOST_DAYS, ROOT, Record, digest_of, last_change, report_of, rounded

RENEW = "`make planner-report` on a quiet machine measures again and writes the record and the docs"
NUMBER = re.compile(r"\d+(?:\.\d+)?")
RECORD = Record.load()
CELLS = default_grid()


@pytest.fixture(scope="module")
def judged() -> tuple[dict[str, Any], list[Row]]:
    found, rows = judge(CELLS, RECORD.trials)
    return report_of(RECORD, found), rows


def test_held_out_cells_are_predicted(judged: tuple[dict[str, Any], list[Row]]) -> None:
    assert too_far(judged[0]) == [], "the fit or the simulator got worse; if it is the trials that are odd, " + RENEW


def test_parameters_are_those_that_were_fitted(judged: tuple[dict[str, Any], list[Row]]) -> None:
    now, then = (flat(fitted) for fitted in (judged[0]["fitted"], RECORD.fitted))
    assert now == pytest.approx(then, rel=1e-6), "python -m tests.perf.planner_report --skip-simulation writes them"


def test_docs_show_the_record(judged: tuple[dict[str, Any], list[Row]]) -> None:
    report, rows = judged
    begin, end = "<!-- validation: begin -->\n", "\n<!-- validation: end -->"
    shown = (ROOT / "docs/planner.md").read_text().partition(begin)[2].partition(end)[0]
    wanted = text_of(report, table(rows))
    problem = "python -m tests.perf.planner_report --skip-simulation writes it"
    assert NUMBER.sub("#", shown) == NUMBER.sub("#", wanted), problem
    now, then = ([float(number) for number in NUMBER.findall(text)] for text in (wanted, shown))
    # Another processor's sums end in other digits, and simulated events that fall together then change places.
    assert then == pytest.approx(now, rel=0.03, abs=1.0), problem


def test_every_cell_was_measured_as_today_s_workloads_ask() -> None:
    assert [(t.cell, t.round) for t in RECORD.trials] == [(c, r) for r in range(RECORD.num_rounds) for c in CELLS]
    for trial in RECORD.trials:
        asked = trial_workload(trial.cell, trial.round).num_output.tolist()
        assert [request.num_tokens for request in trial.requests] == asked, f"the workload changed: {RENEW}"


def test_the_record_is_of_the_model_that_the_command_serves() -> None:
    assert digest_of(ROOT / "demo" / "model") == RECORD.checkpoint, f"the checkpoint changed: {RENEW}"
    assert RECORD.workers == WORKER_OPTIONS, f"workers' options changed: {RENEW}"


def test_the_record_is_of_code_that_has_not_changed_for_long_since() -> None:
    changed = last_change()
    if changed is None:
        pytest.skip("no git history to tell when the code that serves was changed")
    behind = RECORD.days_behind(changed)
    assert behind <= MOST_DAYS, f"measured {RECORD.at}, {behind} days before the code was last changed: {RENEW}"


def test_age_is_counted_to_the_last_change_and_not_to_today() -> None:
    old = replace(RECORD, at="2026-01-31")
    assert old.days_behind(date(2026, 5, 1)) == MOST_DAYS
    assert old.days_behind(date(2026, 1, 30)) == -1


def test_another_checkpoint_has_another_digest(tmp_path: Path) -> None:
    for name, text in (("config.json", "{}"), ("model.safetensors", "weights")):
        (tmp_path / name).write_text(text)
    before = digest_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("read by nobody who is measured")
    assert digest_of(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("other weights")
    assert digest_of(tmp_path) != before


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    RECORD.save(tmp_path / "record.json")
    again = Record.load(tmp_path / "record.json")
    assert again == RECORD
    assert [rounded(trial) for trial in RECORD.trials] == RECORD.trials


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    held_out = {cell for index, cell in enumerate(CELLS) if is_held_out(index, cell)}
    return fit([trial for trial in RECORD.trials if trial.cell not in held_out])


@pytest.mark.parametrize(("what", "noticed"), [("", []), ("decode", None), ("prefill", None), ("calls", None)])
def test_a_simulator_that_gets_worse_fails(fitted: Fitted, what: str, noticed: list[str] | None) -> None:
    """One round of the quickest held-out cells is enough to see it."""
    found = problems(worse(fitted, what) if what else fitted)
    assert found == noticed if noticed is not None else found


def worse(fitted: Fitted, what: str) -> Fitted:
    """Return speeds of which one is half of what it was."""
    if what == "decode":
        return replace(fitted, decode=replace(fitted.decode, **halved(fitted.decode, "fixed_s", "row_s")))
    if what == "prefill":
        return replace(fitted, prefill=replace(fitted.prefill, **halved(fitted.prefill, "prompt_token_s", "pair_s")))
    return replace(fitted, wire=replace(fitted.wire, **halved(fitted.wire, "admit_s", "rpc_s")))


def halved(value: Any, *names: str) -> dict[str, float]:
    return {name: getattr(value, name) / 2 for name in names}


def problems(fitted: Fitted) -> list[str]:
    """Return the metrics that are too far off."""
    of_round = [trial for trial in RECORD.trials if trial.round == 1]
    cells = [Cell(64, 32, 4), Cell(64, 96, 1), Cell(256, 32, 1), Cell(256, 32, 8), Cell(256, 96, 4)]
    rows = [row_of(fitted, cell, of_round, is_held_out=True) for cell in cells]
    return [metric for metric in METRICS if median_error(rows, metric) > MOST_ERROR]


def flat(values: dict[str, Any] | Any, prefix: str = "") -> dict[str, float]:
    """Return nested numbers by their path."""
    found: dict[str, float] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: float(value)}
    return found
