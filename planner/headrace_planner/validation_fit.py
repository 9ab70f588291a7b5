"""The simulated cluster's speed, from trials: each term from what was measured of it alone.

    step times     workers' own step seconds, over rows, context, prompt tokens and pairs
    slowdowns      the same, over the share of its time in which a worker's steps met the other worker's
    between steps  one client: the gap between two tokens without the step
    calls          one client: time to first token without the prefill step; first to second token without a step
    crowding       many clients: first to second token without steps, over what it is of one client

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
    between_steps_s: float = 0.0
    """From the end of a decode step to the next one's begin: what it brought is told, the next is planned."""


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
    alone = fit_wire(trials)
    wire = replace(alone, crowding=fit_crowding(trials, alone))
    return Fitted(prefill, decode, wire, prefill_slowdown, decode_slowdown, between_steps(trials))


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
    the hand-off, a step, and a call. The router's own part, more than a call takes, is in the first.

    Raises:
        InvalidRequestError: BAD_FIT, fewer than 3 trials of one client.
    """
    firsts_s: list[float] = []
    handoffs: list[MeasuredStep] = []
    for trial in trials:
        if trial.cell.concurrency == 1:
            first_s, second_s = _first_and_second_s(trial)
            firsts_s.append(first_s - prefill_step(trial).seconds)
            seconds = second_s - decode_step(trial).seconds
            handoffs.append(MeasuredStep(StepShape(prompt_tokens=trial.cell.isl), seconds))
    handoff = fit_linear(handoffs)
    calls_s = max(0.0, statistics.median(firsts_s))
    rpc_s = min(calls_s / 3, handoff.fixed_s / 2)
    return Wire(
        bytes_per_token=0.0,
        latency_s=handoff.fixed_s - 2 * rpc_s,
        latency_per_token_s=handoff.prompt_token_s,
        admit_s=calls_s - 2 * rpc_s,
        rpc_s=rpc_s,
    )


def fit_crowding(trials: Iterable[Trial], alone: Wire) -> float:
    """Return `Wire.crowding`: how the way to the second token grows with the sequences that are computed meanwhile.

    It takes two calls, the hand-off, and two decode steps: the one it comes in, and half of one that is under way, both
    when pages are asked for and when they arrived. The fit is in relative error.
    """
    weighted, squares = 0.0, 0.0
    for trial in trials:
        if trial.cell.concurrency == 1:
            continue
        decode, prefill = decode_step(trial), prefill_step(trial)
        computing = (
            decode.shape.num_rows * trial.decode.seconds + prefill.shape.num_chunks * trial.prefill.seconds
        ) / trial.wall_s
        _, second_s = _first_and_second_s(trial)
        alone_s = 2 * alone.rpc_s + alone.latency_s + alone.latency_per_token_s * trial.cell.isl
        stretch = (second_s - 2 * decode.seconds) / alone_s
        weighted += computing / stretch * (1 - 1 / stretch)
        squares += (computing / stretch) ** 2
    return max(0.0, weighted / squares) if squares else 0.0


def between_steps(trials: Iterable[Trial]) -> float:
    """Return what lone requests' later tokens took beside the step, seconds; 0 if there were none."""
    gaps_s: list[float] = []
    for trial in trials:
        later = [request for request in trial.requests[1:] if request.num_tokens > 2]
        if trial.cell.concurrency == 1 and later:
            seconds = sum(request.last_s - request.second_s for request in later)
            gaps_s.append(seconds / sum(request.num_tokens - 2 for request in later) - decode_step(trial).seconds)
    return max(0.0, statistics.median(gaps_s)) if gaps_s else 0.0


def _first_and_second_s(trial: Trial) -> tuple[float, float]:
    """Return the median seconds to the first token, and from it to the second."""
    counted = trial.requests[trial.cell.concurrency :]
    first_s = statistics.median(request.first_s for request in counted)
    return first_s, statistics.median(request.second_s - request.first_s for request in counted)


def predict(fitted: Fitted, cell: Cell, rounds: Iterable[int]) -> Outcome:
    """Simulate the rounds of a cell."""
    spec = WorkerSpec(fitted.prefill, num_pages=4096, max_step_tokens=1024, max_step_sequences=64)
    decode = replace(fitted.decode, fixed_s=fitted.decode.fixed_s + fitted.between_steps_s)
    config = SimConfig(
        prefill=spec,
        decode=replace(spec, times=decode),
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
