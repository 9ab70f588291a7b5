"""The simulated cluster's speed, from trials: each term from what was measured of it alone.

    step times     workers' own step seconds, over rows, context, prompt tokens and pairs
    slowdowns      the same, over the share of its time in which a worker's steps met the other worker's
    calls          one client: time to first token without the prefill step; first to second token without a step

Nothing is fitted to what the simulation gives, so queues and batches, which only the simulation knows, are predicted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.sim_fit import MeasuredStep, fit_linear
from headrace_planner.sim_result import SimResult
from headrace_planner.simulator import simulate
from headrace_planner.step_times import LinearStepTimes, StepShape, chunk_pairs
from headrace_planner.validation import Cell, Outcome, RequestTimes, Trial, outcome, trial_workload

_SLOWDOWNS = tuple(1 + 0.05 * i for i in range(31))
_NO_KNEE = (1 << 30,)
_KNEES = (2, 4, 8, *_NO_KNEE)
"""Rows from which one more costs less: most experts are read anyway by then."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """All that the simulated cluster's speed follows from: one prefill and one decode worker on one machine.

    A slowdown is how much longer a step of one takes while the other computes, too.
    """

    prefill: LinearStepTimes
    decode: LinearStepTimes
    wire: Wire
    prefill_slowdown: float = 1.0
    decode_slowdown: float = 1.0


@dataclass(frozen=True, slots=True)
class MeanStep:
    """A worker's mean step in one cell. `shared` is the share of its time in which the other worker computed, too."""

    shape: StepShape
    seconds: float
    shared: float


def fit(trials: Sequence[Trial]) -> Fitted:
    """Return the speeds that `trials` show.

    Raises:
        InvalidRequestError: BAD_FIT, fewer than 3 cells.
    """
    prefill, prefill_slowdown = fit_shared(by_cell(trials, prefill_step))
    decode, decode_slowdown = fit_shared(by_cell(trials, decode_step), knees=_KNEES)
    return Fitted(prefill, decode, fit_wire(trials), prefill_slowdown, decode_slowdown)


def prefill_step(trial: Trial) -> MeanStep:
    """Return the mean step of a trial's prefill worker. With two clients or more decode hardly ever rests."""
    cell, tokens = trial.cell, trial.prefill.num_tokens / trial.prefill.num_steps
    num_chunks = tokens / cell.isl
    shape = StepShape(prompt_tokens=tokens, prompt_pairs=num_chunks * chunk_pairs(0, cell.isl), num_chunks=num_chunks)
    return MeanStep(shape, trial.prefill.seconds / trial.prefill.num_steps, float(cell.concurrency > 1))


def decode_step(trial: Trial) -> MeanStep:
    """Return the mean step of a trial's decode worker; one client's prompt is over before its decode begins."""
    rows = trial.decode.num_tokens / trial.decode.num_steps
    lengths = trial_workload(trial.cell, trial.round).num_output
    # A sequence is in as many steps as it has tokens, at every length up to its last.
    context = trial.cell.isl + float(np.square(lengths).sum() / lengths.sum()) / 2
    shared = trial.prefill.seconds / trial.wall_s if trial.cell.concurrency > 1 else 0.0
    return MeanStep(StepShape(rows, rows * context), trial.decode.seconds / trial.decode.num_steps, shared)


def fit_shared(
    cells: Sequence[Sequence[MeanStep]], *, knees: Sequence[int] = _NO_KNEE
) -> tuple[LinearStepTimes, float]:
    """Return step times alone on the machine, and the slowdown beside the other worker, that fit best.

    Args:
        cells: for each cell its trials' mean steps; those of median time count, since a stall can hit any trial.
        knees: rows above which a row may cost something else.
    """
    best: tuple[float, LinearStepTimes, float] | None = None
    for slowdown in _SLOWDOWNS:
        steps = [step for cell in cells for step in _middle(cell, slowdown)]
        times = fit_linear(steps, knees=knees)
        error = sum((times.step_s(step.shape) / step.seconds - 1) ** 2 for step in steps)
        if best is None or error < best[0]:
            best = error, times, slowdown
    assert best is not None, "there are slowdowns to try"
    return best[1], best[2]


def by_cell(trials: Iterable[Trial], mean_step: Callable[[Trial], MeanStep]) -> list[list[MeanStep]]:
    """Return the trials' mean steps, those of one cell together."""
    cells: dict[Cell, list[MeanStep]] = {}
    for trial in trials:
        cells.setdefault(trial.cell, []).append(mean_step(trial))
    return list(cells.values())


def _middle(cell: Sequence[MeanStep], slowdown: float) -> list[MeasuredStep]:
    """Return the trial of median time, or both in the middle of an even number, as steps alone on the machine."""
    alone = [MeasuredStep(step.shape, step.seconds * (1 - step.shared * (1 - 1 / slowdown))) for step in cell]
    alone.sort(key=lambda step: step.seconds)
    count = len(alone)
    return alone[(count - 1) // 2 : count // 2 + 1]


def fit_wire(trials: Iterable[Trial]) -> Wire:
    """Return what calls and hand-offs take, from requests that were alone.

    A first token takes the prefill step and three calls: to the router, to the worker, back. The second takes a call,
    the hand-off, a step, and a call.

    Raises:
        InvalidRequestError: BAD_FIT, fewer than 3 trials of one client.
    """
    calls_s: list[float] = []
    handoffs: list[MeasuredStep] = []
    for trial in trials:
        if trial.cell.concurrency > 1:
            continue
        counted = trial.requests[1:]
        first_s = statistics.median(request.first_s for request in counted)
        second_s = statistics.median(request.second_s - request.first_s for request in counted)
        calls_s.append((first_s - prefill_step(trial).seconds) / 3)
        handoffs.append(MeasuredStep(StepShape(prompt_tokens=trial.cell.isl), second_s - decode_step(trial).seconds))
    handoff = fit_linear(handoffs)
    call_s = max(0.0, statistics.median(calls_s))
    return Wire(
        bytes_per_token=0.0,
        latency_s=max(0.0, handoff.fixed_s - 2 * call_s),
        latency_per_token_s=handoff.prompt_token_s,
        admit_s=call_s,
        rpc_s=call_s,
    )


def predict(fitted: Fitted, cell: Cell, rounds: Iterable[int]) -> Outcome:
    """Simulate the rounds of a cell."""
    spec = WorkerSpec(fitted.prefill, num_pages=4096, max_step_tokens=1024, max_step_sequences=64)
    config = SimConfig(
        prefill=spec,
        decode=replace(spec, times=fitted.decode),
        num_prefill=1,
        num_decode=1,
        wire=fitted.wire,
        fidelity="exact",
        interference=(fitted.prefill_slowdown, fitted.decode_slowdown),
    )
    return outcome(cell, [_times(simulate(config, trial_workload(cell, number))) for number in rounds])


def _times(result: SimResult) -> list[RequestTimes]:
    lengths = (int(count) for count in result.workload.num_output)
    ends = zip(result.ttft_s, result.e2e_s, lengths, strict=True)
    return [RequestTimes(float(first), float("nan"), float(last), count) for first, last, count in ends]
