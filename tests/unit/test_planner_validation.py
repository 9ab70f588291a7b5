"""The fit finds a simulated cluster's speed again, and says so on cells it has not seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from headrace_planner.sim_config import Wire
from headrace_planner.step_times import LinearStepTimes
from headrace_planner.validation import (
    Cell,
    Fitted,
    Measured,
    Outcome,
    as_json,
    calibrate,
    closed_throughput,
    default_grid,
    first_guess,
    from_json,
    is_held_out,
    judge,
    loss,
    median_error,
    predict,
    table,
    turn,
)
from headrace_planner.validation_cluster import read_saved

TRUTH = Fitted(
    LinearStepTimes(fixed_s=0.006, prompt_token_s=4e-5, pair_s=2e-9),
    LinearStepTimes(fixed_s=0.004, row_s=3e-4, context_s=1e-8),
    Wire(bytes_per_token=1.0, bandwidth=1e12, latency_s=0.003, admit_s=0.001, rpc_s=0.001),
    1.3,
    1.2,
)


def run(cell: Cell) -> Measured:
    outcome = predict(TRUTH, cell)
    prefill_s = 0.006 + 4e-5 * cell.isl
    return Measured(
        cell, Outcome(outcome.ttft_s, outcome.itl_s, outcome.throughput, 6, prefill_s, outcome.itl_s + 0.004)
    )


def test_the_fit_predicts_cells_it_has_not_seen() -> None:
    cells = [Cell(isl, 12, c) for isl in (64, 256, 1024) for c in (1, 4)]
    measured = [run(cell) for cell in cells]
    fitted_cells = [m for index, m in enumerate(measured) if not is_held_out(index, m.cell)]
    guess = first_guess(fitted_cells)
    fitted = calibrate(fitted_cells, guess, rounds=2)
    assert loss(fitted, fitted_cells) <= loss(guess, fitted_cells)
    rows = judge(fitted, measured)
    for metric in ("ttft_s", "itl_s"):
        assert median_error(rows, metric) < 0.2
    assert table(rows).count("held out") == sum(row.is_held_out for row in rows) == 3


def test_the_grid_holds_out_half_of_every_kind() -> None:
    grid = default_grid()
    held_out = [cell for index, cell in enumerate(grid) if is_held_out(index, cell)]
    assert len(held_out) == len(grid) // 2
    for part in ("isl", "osl", "concurrency"):
        assert {getattr(cell, part) for cell in held_out} == {getattr(cell, part) for cell in grid}


def test_cells_survive_a_restart(tmp_path: Path) -> None:
    measured = run(Cell(64, 8, 1))
    assert from_json(as_json(measured)) == measured
    assert read_saved(tmp_path / "none.json") == []


def test_knobs_turn_one_coefficient_and_slowdowns_stay_above_one() -> None:
    assert turn(TRUTH, "prefill.fixed_s", 2).prefill.fixed_s == pytest.approx(0.012)
    assert turn(TRUTH, "decode.prompt_token_s", 2).decode.prompt_token_s > 0
    assert turn(TRUTH, "decode_slowdown", 0.1).decode_slowdown == 1.0


def test_throughput_of_a_closed_loop_is_littles_law() -> None:
    assert closed_throughput(Cell(64, 10, 4), 2.0) == pytest.approx(20.0)
