"""The cells that predictions are judged on: what each serves, what it gave, how far a prediction is from that.

A cell is a closed loop of `concurrency` clients against a real local cluster, `isl` tokens in and about `osl` out. A
trial is one round of it. Output lengths vary, by the same draw in the measurement and in the simulation: with equal
lengths requests would start and end in step with each other, which no real load does and no model can follow.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from headrace_core.request_trace import Workload

from headrace_planner.workload import Lengths, closed_loop

METRICS = ("ttft_s", "itl_s", "throughput")
MAX_OTHERS_SHARE = 0.1
"""Of the machine's CPU time, for other programs during a trial; beyond it the trial is taken again."""
_OUTPUT_SPREAD = 0.3
_TOKENS_PER_CLIENT = 240
_LEAST_PER_CLIENT = 3


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


def trial_workload(cell: Cell, number: int) -> Workload:
    """Return the requests of round `number` of a cell; outputs are log-normal. -1 is a round that is not counted."""
    per_client = max(_LEAST_PER_CLIENT, _TOKENS_PER_CLIENT // cell.osl)
    return closed_loop(
        Lengths(cell.isl, cell.osl, output_spread=_OUTPUT_SPREAD),
        concurrency=cell.concurrency,
        num_requests=cell.concurrency * per_client,
        seed=number + 1,
    )


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """One request as its client saw it: seconds from asking to the first, second and last of `num_tokens` tokens."""

    first_s: float
    second_s: float
    last_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepSums:
    """A worker's steps: how many, their seconds, their tokens."""

    num_steps: float
    seconds: float
    num_tokens: float

    def since(self, before: StepSums) -> StepSums:
        """Return what came after `before`."""
        return StepSums(
            self.num_steps - before.num_steps, self.seconds - before.seconds, self.num_tokens - before.num_tokens
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """One round of a cell, as measured."""

    cell: Cell
    round: int
    requests: Sequence[RequestTimes]
    prefill: StepSums
    decode: StepSums
    wall_s: float
    others_share: float | None = None
    """Of the machine's CPU time, what other programs used meanwhile; None: not known."""
    num_discarded: int = 0
    """Trials before this one that were thrown away, because others used too much."""

    @property
    def is_disturbed(self) -> bool:
        """Whether other programs used so much of the machine that it shows."""
        return self.others_share is not None and self.others_share > MAX_OTHERS_SHARE

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `as_json` returned."""
        requests = [RequestTimes(**request) for request in value["requests"]]
        prefill, decode = StepSums(**value["prefill"]), StepSums(**value["decode"])
        # Trials that were written down earlier do not know of others.
        others = {name: value[name] for name in ("others_share", "num_discarded") if name in value}
        return cls(Cell(**value["cell"]), value["round"], requests, prefill, decode, value["wall_s"], **others)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What clients saw of a cell: seconds, and output tokens per second.

    TTFT is the median over requests. ITL is the mean over all gaps: tokens that a busy client reads together have no
    gaps of their own. Throughput is Little's law in a closed loop: clients x mean tokens of a request / its mean
    duration.
    """

    ttft_s: float
    itl_s: float
    throughput: float


def outcome(cell: Cell, rounds: Iterable[Sequence[RequestTimes]]) -> Outcome:
    """Return what a cell's rounds, measured or simulated, come to: of each figure the median round.

    A round's requests are in the order in which they were asked for. Every client's first is left out, since those
    start all at once. Rounds that a stall of the machine hit do not count for more than others.
    """
    each = [_round_outcome(cell, requests[cell.concurrency :]) for requests in rounds]
    return Outcome(
        ttft_s=statistics.median(one.ttft_s for one in each),
        itl_s=statistics.median(one.itl_s for one in each),
        throughput=statistics.median(one.throughput for one in each),
    )


def _round_outcome(cell: Cell, counted: Sequence[RequestTimes]) -> Outcome:
    num_tokens = sum(request.num_tokens for request in counted)
    return Outcome(
        ttft_s=statistics.median(request.first_s for request in counted),
        itl_s=sum(request.last_s - request.first_s for request in counted) / (num_tokens - len(counted)),
        throughput=cell.concurrency * num_tokens / sum(request.last_s for request in counted),
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the published table."""

    cell: Cell
    is_held_out: bool
    num_requests: int
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


def median_error(rows: Sequence[Row], metric: str, *, held_out: bool = True) -> float:
    """Return the median error of the held-out cells, or of the fitted ones; NaN if there are none."""
    errors = [row.error(metric) for row in rows if row.is_held_out is held_out]
    return statistics.median(errors) if errors else float("nan")


def table(rows: Sequence[Row]) -> str:
    """Return the published table, Markdown."""
    lines = [
        "| in/out x clients | | requests | TTFT ms measured | predicted | error | ITL ms measured | predicted | error "
        "| tok/s measured | predicted | error |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: (not row.is_held_out, row.cell.isl, row.cell.osl, row.cell.concurrency)):
        cells = [row.cell.name, "held out" if row.is_held_out else "fitted", str(row.num_requests)]
        for metric, scale, digits in (("ttft_s", 1e3, 1), ("itl_s", 1e3, 2), ("throughput", 1, 0)):
            real, guess = getattr(row.measured, metric) * scale, getattr(row.predicted, metric) * scale
            cells += [f"{real:.{digits}f}", f"{guess:.{digits}f}", f"{row.error(metric):.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
