"""How wrong the simulator is: fitted on some cells of a grid of real runs, judged on the others.

A cell is a closed loop of `concurrency` clients against a real local cluster, `isl` tokens in and `osl` out. The fit
starts from what the cells show directly (prefill times by prompt length, token gaps by batch) and then moves each
coefficient up and down while the simulated figures of the fitted cells come closer to the measured ones. Held-out cells
are looked at once, afterwards.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.sim_fit import MeasuredStep, fit_linear
from headrace_planner.simulator import simulate
from headrace_planner.step_times import LinearStepTimes, StepShape, chunk_pairs
from headrace_planner.workload import Lengths, closed_loop

METRICS = ("ttft_s", "itl_s", "throughput")


@dataclass(frozen=True, slots=True)
class Cell:
    """One case of the grid."""

    isl: int
    osl: int
    concurrency: int

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.isl}/{self.osl} x{self.concurrency}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Median TTFT, mean ITL over all gaps, seconds; output tokens per second of the whole cell.

    ITL is a mean because tokens that a busy client reads together have no gaps of their own. Throughput is Little's
    law in a closed loop: clients x tokens of a request / its mean duration. `prefill_s` and `handoff_s` are medians:
    computing the prompt as the service reports it, and the first to the second token.
    """

    ttft_s: float
    itl_s: float
    throughput: float
    num_requests: int = 0
    prefill_s: float = 0.0
    handoff_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell and what it gave."""

    cell: Cell
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Fitted:
    """All that the simulated cluster's speed follows from: one prefill and one decode worker on one machine."""

    prefill: LinearStepTimes
    decode: LinearStepTimes
    wire: Wire
    prefill_slowdown: float = 1.0
    decode_slowdown: float = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the published table."""

    cell: Cell
    is_held_out: bool
    measured: Outcome
    predicted: Outcome

    def error(self, metric: str) -> float:
        """Return |predicted - measured| / measured."""
        real = getattr(self.measured, metric)
        return abs(getattr(self.predicted, metric) - real) / real


def default_grid() -> list[Cell]:
    """Return the cells, longest prompts last."""
    return [Cell(isl, osl, concurrency) for isl in (64, 256, 1024) for osl in (32, 96) for concurrency in (1, 4, 8, 16)]


def is_held_out(index: int, cell: Cell) -> bool:
    """Return True for every other cell, as on a chess board, so that no row or column is all fitted."""
    ladder = {1: 0, 4: 1, 8: 2, 16: 3}.get(cell.concurrency, index)
    return (ladder + (cell.osl > 64) + {64: 0, 256: 1, 1024: 2}.get(cell.isl, index)) % 2 == 1


def predict(fitted: Fitted, cell: Cell, *, num_requests: int = 0) -> Outcome:
    """Simulate a cell."""
    spec = WorkerSpec(fitted.prefill, num_pages=4096, max_step_tokens=1024, max_step_sequences=64)
    config = SimConfig(
        spec,
        replace(spec, times=fitted.decode),
        None,
        1,
        1,
        wire=fitted.wire,
        fidelity="exact",
        interference=(fitted.prefill_slowdown, fitted.decode_slowdown),
    )
    # The first round starts all at once, in the measurement too; it is left out in both.
    count = num_requests or max(5, 3 * cell.concurrency)
    result = simulate(
        config, closed_loop(Lengths(cell.isl, cell.osl), concurrency=cell.concurrency, num_requests=count)
    )
    return Outcome(
        float(np.median(result.ttft_s[cell.concurrency :])),
        result.itl_mean(),
        closed_throughput(cell, float(result.e2e_s[cell.concurrency :].mean())),
        num_requests=count - cell.concurrency,
    )


def closed_throughput(cell: Cell, mean_e2e_s: float) -> float:
    """Return output tokens per second of clients that always have a request in flight."""
    return cell.concurrency * cell.osl / mean_e2e_s


def first_guess(measured: Sequence[Measured]) -> Fitted:
    """Return what the cells show directly; slowdowns are left at 1."""
    alone = [m for m in measured if m.cell.concurrency == 1] or list(measured)
    prefill = fit_linear(
        [
            MeasuredStep(
                StepShape(prompt_tokens=m.cell.isl, prompt_pairs=chunk_pairs(0, m.cell.isl), num_chunks=1),
                max(m.outcome.prefill_s, 1e-5),
            )
            for m in (alone if len(alone) >= 3 else measured)
        ]
    )
    decode = fit_linear(
        [
            MeasuredStep(
                StepShape(m.cell.concurrency, int(m.cell.concurrency * (m.cell.isl + m.cell.osl / 2))), m.outcome.itl_s
            )
            for m in measured
        ]
    )
    call_s = statistics.median(max(1e-4, m.outcome.ttft_s - m.outcome.prefill_s) for m in alone) / 4
    move_s = statistics.median(max(1e-4, m.outcome.handoff_s - m.outcome.itl_s) for m in alone)
    wire = Wire(bytes_per_token=1.0, bandwidth=1e12, latency_s=move_s, admit_s=call_s, rpc_s=call_s)
    return Fitted(prefill, decode, wire)


def calibrate(measured: Sequence[Measured], guess: Fitted, *, rounds: int = 4) -> Fitted:
    """Move one coefficient at a time, by smaller and smaller factors, while the fitted cells come closer."""
    best, best_loss = guess, loss(guess, measured)
    factor = 1.6
    for _ in range(rounds):
        for knob in KNOBS:
            for direction in (factor, 1 / factor):
                candidate = turn(best, knob, direction)
                candidate_loss = loss(candidate, measured)
                if candidate_loss < best_loss - 1e-6:
                    best, best_loss = candidate, candidate_loss
                    break
        factor = 1 + (factor - 1) * 0.5
    return best


def loss(fitted: Fitted, measured: Sequence[Measured]) -> float:
    """Return the mean absolute log ratio of simulated to measured figures."""
    total = 0.0
    for m in measured:
        predicted = predict(fitted, m.cell)
        for metric in METRICS:
            ratio = getattr(predicted, metric) / getattr(m.outcome, metric)
            total += abs(math.log(max(ratio, 1e-9)))
    return total / (len(METRICS) * len(measured))


KNOBS = (
    "prefill.fixed_s",
    "prefill.prompt_token_s",
    "prefill.pair_s",
    "decode.fixed_s",
    "decode.row_s",
    "decode.context_s",
    "wire.rpc_s",
    "wire.latency_s",
    "prefill_slowdown",
    "decode_slowdown",
)
_SMALLEST = {"fixed_s": 2e-4, "row_s": 1e-5, "context_s": 1e-9, "prompt_token_s": 1e-6, "pair_s": 1e-10}


def turn(fitted: Fitted, knob: str, factor: float) -> Fitted:
    """Return `fitted` with one coefficient multiplied; one that was 0 gets a small value, slowdowns stay above 1."""
    part, _, name = knob.partition(".")
    if not name:
        return replace(fitted, **{part: max(1.0, getattr(fitted, part) * factor)})
    whole: Any = getattr(fitted, part)
    value = getattr(whole, name) or _SMALLEST.get(name, 1e-4)
    return replace(fitted, **{part: replace(whole, **{name: value * factor})})


def judge(fitted: Fitted, measured: Sequence[Measured]) -> list[Row]:
    """Return every cell's line, fitted ones too."""
    return [
        Row(m.cell, is_held_out(index, m.cell), m.outcome, predict(fitted, m.cell)) for index, m in enumerate(measured)
    ]


def median_error(rows: Sequence[Row], metric: str) -> float:
    """Return the median error of the held-out cells."""
    errors = [row.error(metric) for row in rows if row.is_held_out]
    return statistics.median(errors) if errors else float("nan")


def table(rows: Sequence[Row]) -> str:
    """Return the published table, Markdown."""
    lines = [
        "| in/out x clients | | TTFT ms measured | predicted | error | ITL ms measured | predicted | error "
        "| tok/s measured | predicted | error |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: (not row.is_held_out, row.cell.isl, row.cell.osl, row.cell.concurrency)):
        cells = [row.cell.name, "held out" if row.is_held_out else "fitted"]
        for metric, scale, digits in (("ttft_s", 1e3, 1), ("itl_s", 1e3, 2), ("throughput", 1, 0)):
            real, guess = getattr(row.measured, metric) * scale, getattr(row.predicted, metric) * scale
            cells += [f"{real:.{digits}f}", f"{guess:.{digits}f}", f"{row.error(metric):.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_json(measured: Measured) -> dict[str, Any]:
    """Return a measured cell as plain values."""
    return {"cell": asdict(measured.cell), "outcome": asdict(measured.outcome)}


def from_json(value: dict[str, Any]) -> Measured:
    """Read what `as_json` wrote."""
    return Measured(Cell(**value["cell"]), Outcome(**value["outcome"]))
