"""The fit finds a simulated cluster's speed again from its trials, and predicts cells it has not seen."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from headrace_core.errors import InvalidRequestError
from headrace_planner.machine_use import MachineUse, machine_use
from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.simulator import simulate
from headrace_planner.step_times import LinearStepTimes, StepShape
from headrace_planner.validation import (
    METRICS,
    Cell,
    Outcome,
    RequestTimes,
    Row,
    StepSums,
    Trial,
    default_grid,
    is_held_out,
    median_error,
    outcome,
    table,
    trial_workload,
)
from headrace_planner.validation_cluster import read_saved, undisturbed
from headrace_planner.validation_fit import (
    Fitted,
    MeanStep,
    between_steps,
    fit,
    fit_crowding,
    fit_shared,
    fit_wire,
    predict,
)

TRUTH = Fitted(
    LinearStepTimes(fixed_s=0.006, prompt_token_s=4e-5, pair_s=2e-8),
    LinearStepTimes(fixed_s=0.004, row_s=3e-4, context_s=1e-6),
    Wire(bytes_per_token=0.0, latency_s=0.003, latency_per_token_s=1e-6, admit_s=0.001, rpc_s=0.001),
    1.3,
    1.2,
)


def run(cell: Cell, number: int = 0) -> Trial:
    """Return a trial of a cluster that has TRUTH's speeds."""
    spec = WorkerSpec(TRUTH.prefill, num_pages=4096, max_step_tokens=1024, max_step_sequences=64)
    config = SimConfig(
        prefill=spec,
        decode=replace(spec, times=TRUTH.decode),
        num_prefill=1,
        num_decode=1,
        wire=TRUTH.wire,
        fidelity="exact",
        interference=(TRUTH.prefill_slowdown, TRUTH.decode_slowdown),
    )
    workload = trial_workload(cell, number)
    result = simulate(config, workload)
    # One client: the second token comes a call, the hand-off, a step and a call after the first.
    alone_s = TRUTH.decode.step_s(StepShape(1, cell.isl + 1)) + 0.005 + 1e-6 * cell.isl
    requests = [
        RequestTimes(float(first), float(first) + alone_s, float(last), int(count))
        for first, last, count in zip(result.ttft_s, result.e2e_s, workload.num_output, strict=True)
    ]
    prefill, decode = (StepSums(use.num_steps, use.busy_s, use.num_tokens) for use in result.workers)
    return Trial(cell, number, requests, prefill, decode, result.end_s)


def test_the_fit_predicts_cells_it_has_not_seen() -> None:
    fitted = fit([run(Cell(isl, 12, c)) for isl in (64, 256, 1024) for c in (1, 3)])
    rows: list[Row] = []
    for cell in (Cell(128, 12, 1), Cell(512, 12, 2), Cell(512, 24, 4)):
        measured = outcome(cell, [run(cell).requests])
        rows.append(Row(cell, True, 1, measured, predict(fitted, cell, [0])))
    for metric in METRICS:
        assert median_error(rows, metric) < 0.05
        assert max(row.error(metric) for row in rows) < 0.2


def test_calls_and_handoffs_are_found_from_lone_requests() -> None:
    wire = fit_wire([run(Cell(isl, 96, 1)) for isl in (64, 256, 1024)])
    assert (wire.rpc_s, wire.admit_s) == pytest.approx((0.001, 0.001), rel=0.01)
    assert wire.latency_s == pytest.approx(0.003, rel=0.05)
    assert wire.latency_per_token_s == pytest.approx(1e-6, rel=0.2)


def test_a_hand_off_shorter_than_two_calls_leaves_the_rest_to_the_router() -> None:
    """Calls are the same before the first token and after it; what else a first token takes is the router's own."""
    lone = [run(Cell(isl, 96, 1)) for isl in (64, 256, 1024)]
    quick = [
        replace(trial, requests=[replace(r, second_s=r.second_s - 0.004) for r in trial.requests]) for trial in lone
    ]
    wire = fit_wire(quick)
    assert wire.latency_s == pytest.approx(0, abs=1e-6)
    assert wire.rpc_s == pytest.approx(0.0005, rel=0.1)
    assert wire.admit_s + 2 * wire.rpc_s == pytest.approx(0.003, rel=0.01)


def test_what_a_crowd_costs_is_found_from_second_tokens() -> None:
    wire = Wire(bytes_per_token=0.0, latency_s=0.003, admit_s=0.001, rpc_s=0.001)
    step_s, rows = 0.002, 3.0
    for crowding in (0.0, 0.5):
        trials: list[Trial] = []
        for busy in (0.25, 0.5):  # of the time the decode worker computes three rows, and prefill never
            second_s = 2 * step_s + 0.005 * (1 + crowding * rows * busy)
            requests = [RequestTimes(0.1, 0.1 + second_s, 0.4, 20)] * 8
            decode = StepSums(100, 100 * step_s, 100 * rows)
            trials.append(Trial(Cell(64, 32, 4), 0, requests, StepSums(8, 0.0, 512), decode, 100 * step_s / busy))
        assert fit_crowding(trials, wire) == pytest.approx(crowding)
    assert fit_crowding([], wire) == 0


def test_time_between_steps_is_what_later_tokens_of_a_lone_request_take_beside_them() -> None:
    requests = [RequestTimes(0.1, 0.2, 0.2 + 9 * 0.0025, 11)] * 3
    trial = Trial(Cell(64, 11, 1), 0, requests, StepSums(3, 0.03, 192), StepSums(30, 0.06, 30), 1.0)
    assert between_steps([trial]) == pytest.approx(0.0005)
    assert between_steps([replace(trial, cell=Cell(64, 11, 2))]) == 0


def test_a_slowdown_is_told_from_a_slow_step() -> None:
    times = LinearStepTimes(fixed_s=0.01, row_s=0.001)
    cells = [
        [MeanStep(shape, times.step_s(shape) / (1 - shared * (1 - 1 / 1.5)), shared)]
        for rows, shared in ((1, 0.0), (4, 0.9), (8, 0.2), (16, 0.5))
        for shape in [StepShape(rows, rows * 100)]
    ]
    fitted, slowdown = fit_shared(cells)
    assert slowdown == pytest.approx(1.5)
    assert fitted.step_s(StepShape(2, 200)) == pytest.approx(0.012)


def test_a_stalled_trial_does_not_move_the_fit() -> None:
    times = LinearStepTimes(fixed_s=0.01, row_s=0.001)
    shapes = [StepShape(rows, rows * 100) for rows in (1, 4, 16)]
    cells = [[MeanStep(shape, times.step_s(shape), 0.0)] * 2 for shape in shapes]
    cells[1] = [*cells[1], MeanStep(shapes[1], 5.0, 0.0)]
    fitted, _ = fit_shared(cells)
    assert fitted.step_s(shapes[1]) == pytest.approx(0.014)


def test_too_few_cells_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="too few"):
        fit([run(Cell(64, 12, 1)), run(Cell(64, 12, 2))])


def test_an_outcome_leaves_out_every_clients_first_request() -> None:
    requests = [RequestTimes(9.0, 9.1, 9.9, 10), RequestTimes(1.0, 1.2, 2.0, 11), RequestTimes(3.0, 3.2, 4.0, 11)]
    result = outcome(Cell(64, 11, 1), [requests])
    assert (result.ttft_s, result.itl_s, result.throughput) == pytest.approx((2.0, 0.1, 22 / 6))


def test_an_outcome_is_the_median_rounds() -> None:
    rounds = [[RequestTimes(s, s, s + 1.0, 11)] * 2 for s in (1.0, 2.0, 50.0)]
    assert outcome(Cell(64, 11, 1), rounds).ttft_s == 2.0


def test_the_grid_holds_out_half_of_every_kind() -> None:
    grid = default_grid()
    held_out = [cell for index, cell in enumerate(grid) if is_held_out(index, cell)]
    assert len(held_out) == len(grid) // 2
    for part in ("isl", "osl", "concurrency"):
        assert {getattr(cell, part) for cell in held_out} == {getattr(cell, part) for cell in grid}


def test_rounds_serve_different_lengths_and_a_round_always_the_same() -> None:
    cell = Cell(64, 32, 4)
    first, again, second = (trial_workload(cell, number).num_output.tolist() for number in (0, 0, 1))
    assert first == again != second
    assert len(first) == len(second)


def test_trials_survive_a_restart(tmp_path: Path) -> None:
    trial = run(Cell(64, 12, 1))
    saved = tmp_path / "trials.jsonl"
    assert list(read_saved(saved)) == []
    saved.write_text(json.dumps(trial.as_json()) + "\n")
    assert list(read_saved(saved)) == [trial]
    # Trials of before others were watched are read, too.
    known = {name: value for name, value in trial.as_json().items() if name not in ("others_share", "num_discarded")}
    saved.write_text(json.dumps(known) + "\n")
    assert [one.others_share for one in read_saved(saved)] == [None]


@pytest.mark.parametrize(
    ("shares", "kept", "num_discarded"),
    [([0.05], 0.05, 0), ([0.5, 0.1], 0.1, 1), ([0.5, 0.3, 0.2, 0.4], 0.2, 3), ([None], None, 0)],
)
def test_a_disturbed_trial_is_taken_again(shares: list[float | None], kept: float | None, num_discarded: int) -> None:
    trial = run(Cell(64, 12, 1))
    told: list[str] = []
    best = undisturbed(lambda attempt: replace(trial, others_share=shares[attempt]), told.append, pause_s=0.0)
    assert (best.others_share, best.num_discarded) == (kept, num_discarded)
    assert len(told) == sum(share is not None and share > 0.1 for share in shares)


def test_others_use_is_what_this_process_tree_did_not() -> None:
    before = MachineUse(total_s=1000, busy_s=100, own_s=20)
    assert MachineUse(1010, 106, 24).others_share(before) == pytest.approx(0.2)
    assert MachineUse(1010, 104, 25).others_share(before) == 0.0  # clocks that tick apart
    assert before.others_share(before) == 0.0


def test_what_children_computed_is_this_trees() -> None:
    before = machine_use()
    code = "import time\nwhile time.process_time() < 0.1: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    own_s = machine_use().own_s
    assert own_s - before.own_s >= 0.05  # clocks tick in hundredths, and each of four is rounded


def test_the_table_tells_fitted_from_held_out() -> None:
    right, wrong = Outcome(0.1, 0.01, 100.0), Outcome(0.2, 0.01, 50.0)
    rows = [Row(Cell(64, 32, 1), False, 6, right, right), Row(Cell(64, 32, 4), True, 24, right, wrong)]
    assert median_error(rows, "ttft_s") == pytest.approx(1.0)
    assert median_error(rows, "ttft_s", held_out=False) == 0.0
    held_out, fitted = table(rows).splitlines()[2:]
    assert held_out.startswith("| 64/32 x4 | held out | 24 | 100.0 | 200.0 | 100% |")
    assert fitted.startswith("| 64/32 x1 | fitted | 6 |")
