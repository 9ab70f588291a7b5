"""How long one step of a worker takes: what the simulator and the planner ask of a time model. No torch.

A step is one forward pass of a ragged batch: decode rows, one token each, and prompt chunks. Its time depends on a few
sums over the batch (`StepShape`), so a thousand rows cost as much to look up as one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Protocol


@dataclass(slots=True)
class StepShape:
    """The sums over one step's batch that its time depends on; of a mean step they have fractions.

    A value, changed by nobody once it is filled; not frozen, because one is made per simulated step, and that costs
    three times.
    """

    num_rows: float = 0
    """Sequences that decode one token."""
    context_tokens: float = 0
    """Tokens they attend to, all together."""
    prompt_tokens: float = 0
    """Tokens of prompt chunks."""
    prompt_pairs: float = 0.0
    """Query-key pairs of prompt chunks; see `StepTimes.pairs_of`."""
    num_chunks: float = 0
    """Prompt chunks."""
    lanes: dict[int, tuple[float, float]] | None = None
    """Prompt tokens and pairs of each lane that has chunks; None: not known, chunks are spread evenly."""

    @property
    def num_tokens(self) -> float:
        """Tokens the step computes."""
        return self.num_rows + self.prompt_tokens

    def add_chunk(self, start: int, num_tokens: int, lane: int = 0, pairs: float | None = None) -> None:
        """Add a prompt's chunk of `num_tokens` at position `start` and on, in a lane; `pairs` None: all causal ones."""
        if pairs is None:
            pairs = chunk_pairs(start, num_tokens)
        self.num_chunks += 1
        self.prompt_tokens += num_tokens
        self.prompt_pairs += pairs
        if self.lanes is None:
            self.lanes = {lane: (num_tokens, pairs)}
        elif lane in self.lanes:
            tokens_before, pairs_before = self.lanes[lane]
            self.lanes[lane] = tokens_before + num_tokens, pairs_before + pairs
        else:
            self.lanes[lane] = num_tokens, pairs


def chunk_pairs(start: float, num_tokens: float) -> float:
    """Return the causal query-key pairs of `num_tokens` queries at positions `start` and on."""
    return num_tokens * (start + (num_tokens + 1) / 2)


@dataclass(frozen=True, slots=True)
class ChosenPairs:
    """What a chunk's sparse attention costs, in pairs of a query and a token that was chosen for it.

    A query has at most `top_k` of these; what chooses them costs `score` for each pair of the context. A prompt that is
    no longer than that goes as in attention over all, at `near` a pair, and nothing is scored.
    """

    top_k: int
    score: float
    near: float

    def __call__(self, start: float, num_tokens: float) -> float:
        """Return what `num_tokens` queries at positions `start` and on cost."""
        end, pairs = start + num_tokens, chunk_pairs(start, num_tokens)
        if end <= self.top_k:
            return self.near * pairs
        few = max(0.0, self.top_k - start)
        return self.score * pairs + chunk_pairs(start, few) + self.top_k * (num_tokens - few)


class StepTimes(Protocol):
    """Seconds per step. Called once or more per simulated step: microseconds matter."""

    def pairs_of(self, start: float, num_tokens: float, /) -> float:
        """Return what attention of a prompt's chunk counts as, in query-key pairs."""
        ...

    def step_s(self, shape: StepShape) -> float:
        """Return the seconds that a step of `shape` takes."""
        ...


@dataclass(frozen=True, slots=True)
class LinearStepTimes:
    """Seconds = a constant and a coefficient per feature, at least `floor_s`: what `sim_fit.fit_linear` finds.

    `row_s` applies up to `knee_rows` rows and `row_beyond_s` above: experts are read once, however many rows use them.
    """

    fixed_s: float = 0.0
    row_s: float = 0.0
    context_s: float = 0.0
    prompt_token_s: float = 0.0
    pair_s: float = 0.0
    chunk_s: float = 0.0
    knee_rows: int = 1 << 30
    row_beyond_s: float = 0.0
    floor_s: float = 0.0

    def pairs_of(self, start: float, num_tokens: float, /) -> float:
        """Return all of a chunk's causal pairs."""
        return chunk_pairs(start, num_tokens)

    def step_s(self, shape: StepShape) -> float:
        """Return the seconds that a step of `shape` takes."""
        rows, knee = shape.num_rows, self.knee_rows
        # Without calls of `min` and `max`, which would take as long as all the rest.
        rows_s = self.row_s * rows if rows <= knee else self.row_s * knee + self.row_beyond_s * (rows - knee)
        seconds = self.fixed_s + rows_s + self.context_s * shape.context_tokens
        if shape.num_chunks or shape.prompt_tokens:
            seconds += (
                self.prompt_token_s * shape.prompt_tokens
                + self.pair_s * shape.prompt_pairs
                + self.chunk_s * shape.num_chunks
            )
        return seconds if seconds > self.floor_s else self.floor_s


@dataclass(frozen=True, slots=True)
class Curve:
    """A piecewise linear function through `points`, rising in x; beyond the ends it goes on as the last piece does."""

    xs: Sequence[float]
    ys: Sequence[float]

    @staticmethod
    def sample(function: Callable[[float], float], xs: Sequence[float]) -> Curve:
        """Return the curve through `function` at `xs`."""
        return Curve(list(xs), [function(x) for x in xs])

    def __post_init__(self) -> None:
        """Check that there is something to interpolate."""
        assert len(self.xs) == len(self.ys) > 0, "a curve needs points"
        assert all(a < b for a, b in pairwise(self.xs)), "x must rise"

    def __call__(self, x: float) -> float:
        """Return the function's value at `x`."""
        xs, ys = self.xs, self.ys
        if len(xs) == 1:
            return ys[0]
        i = min(max(bisect_right(xs, x) - 1, 0), len(xs) - 2)
        x0, y0 = xs[i], ys[i]
        return y0 + (ys[i + 1] - y0) * (x - x0) / (xs[i + 1] - x0)


def powers_of_two(low: float, high: float, per_octave: int = 1) -> list[float]:
    """Return a geometric grid from `low` to at least `high`."""
    grid, factor = [low], 2 ** (1 / per_octave)
    while grid[-1] < high:
        grid.append(grid[-1] * factor)
    return grid


@dataclass(frozen=True, slots=True)
class TableStepTimes:
    """Seconds from sampled functions: a slow model, such as the roofline, evaluated once on a grid.

    A step costs `dense(tokens) + moe(tokens x imbalance) + decode attention + prompt attention`: the busiest rank of an
    expert-parallel group, for which all others wait, works as every rank would if there were more tokens. Decode
    attention is a family of curves over the mean context, one per batch size; between sizes it is interpolated.

    With data-parallel attention the others wait for the fullest group, or lane: attention and what is dense take as
    long as if every lane had as much (a lone prompt keeps one lane busy, and seven wait). Decode rows are taken to be
    spread evenly, as admission leaves them. Experts are spread over all GPUs, whatever lane a token belongs to.
    """

    dense: Curve
    """All that depends on the number of tokens alone, routed experts apart."""
    moe: Curve
    """Routed experts, with dispatch and combine, when load is even."""
    decode_rows: Sequence[float]
    decode_attention: Sequence[Curve]
    """For each of `decode_rows`: seconds by mean context."""
    prompt_attention: Curve
    """Seconds by query-key pairs."""
    imbalance: float = 1.0
    """Most loaded rank / mean rank."""
    groups: int = 1
    """Data-parallel groups of attention; curves of `dense` and attention are of evenly filled ones."""
    pairs_of: Callable[[float, float], float] = chunk_pairs
    """What `prompt_attention` is by, of a chunk: (start, tokens)."""

    def step_s(self, shape: StepShape) -> float:
        """Return the seconds that a step of `shape` takes."""
        rows = self._evened(shape.num_rows)
        seconds = self.moe((shape.num_rows + shape.prompt_tokens) * self.imbalance)
        if rows:
            seconds += self._decode_attention(rows, shape.context_tokens / shape.num_rows)
        seconds += max((self._lane_s(rows, *lane) for lane in self._lanes(shape)), default=self.dense(rows))
        return max(0.0, seconds)

    def _lane_s(self, rows: float, tokens: float, pairs: float) -> float:
        """Return what is dense and attention of prompts, where every lane has as many tokens and pairs."""
        seconds = self.dense(rows + self.groups * tokens)
        return seconds + self.prompt_attention(self.groups * pairs) if pairs else seconds

    def _evened(self, count: float) -> float:
        """Return how many sequences there were if every group had as many as the fullest."""
        return self.groups * ceil(count / self.groups) if self.groups > 1 else count

    def _lanes(self, shape: StepShape) -> Iterable[tuple[float, float]]:
        """Return tokens and pairs of the lanes; of the fullest if chunks are spread evenly."""
        if shape.lanes is not None or not shape.prompt_tokens:
            return shape.lanes.values() if shape.lanes else ()
        part = ceil(shape.num_chunks / self.groups) / shape.num_chunks if shape.num_chunks else 1 / self.groups
        return [(part * shape.prompt_tokens, part * shape.prompt_pairs)]

    def with_imbalance(self, imbalance: float) -> TableStepTimes:
        """Return the same model with the busiest rank `imbalance` times as loaded as the mean."""
        return replace(self, imbalance=imbalance)

    def _decode_attention(self, rows: float, context: float) -> float:
        grid = self.decode_rows
        if len(grid) == 1:
            return self.decode_attention[0](context) * rows / grid[0]
        i = min(max(bisect_right(grid, rows) - 1, 0), len(grid) - 2)
        low, high = self.decode_attention[i](context), self.decode_attention[i + 1](context)
        return low + (high - low) * (rows - grid[i]) / (grid[i + 1] - grid[i])


def tabulate(
    decode_step_s: Callable[[float, float], float],
    prefill_s: Callable[[float, float], float],
    moe_s: Callable[[float], float],
    pairs_of: Callable[[float, float], float],
    *,
    max_rows: int,
    max_tokens: int,
    max_context: int,
    groups: int = 1,
) -> TableStepTimes:
    """Sample a slow model on grids.

    Args:
        decode_step_s: seconds of a step of (rows, mean context).
        prefill_s: seconds of a step that computes (tokens) of prompts, of each of which (start) are in the cache.
        moe_s: the part of a step of (tokens) that routed experts, dispatch and combine take.
        pairs_of: query-key pairs of such a prefill step of (tokens, start).
        max_rows: largest decode batch.
        max_tokens: largest step.
        max_context: longest sequence.
        groups: data-parallel groups of attention, over which the functions spread sequences evenly.
    """
    tokens = powers_of_two(groups, max(max_tokens, max_rows, 2 * groups), 2)
    linear = Curve.sample(lambda n: prefill_s(n, 0) - _own_pairs_s(prefill_s, pairs_of, n), tokens)
    moe = Curve.sample(moe_s, powers_of_two(1, tokens[-1], 2))
    dense = Curve(linear.xs, [max(0.0, y - moe(x)) for x, y in zip(linear.xs, linear.ys, strict=True)])
    rows = powers_of_two(groups, max(2 * groups, max_rows))
    contexts = powers_of_two(64, max_context)
    attention = [Curve.sample(lambda c, b=b: decode_step_s(b, c) - linear(b), contexts) for b in rows]
    chunk = float(max_tokens)
    starts = [0.0, *powers_of_two(chunk, max_context)]
    base = linear(chunk)
    pairs = Curve(
        [0.0, *(pairs_of(chunk, start) for start in starts)],
        [0.0, *(max(0.0, prefill_s(chunk, start) - base) for start in starts)],
    )
    return TableStepTimes(dense, moe, rows, attention, pairs, groups=groups)


def _own_pairs_s(
    prefill_s: Callable[[float, float], float], pairs_of: Callable[[float, float], float], num_tokens: float
) -> float:
    """Return what first chunks' attention to themselves costs, from how the time grows with the chunks' start."""
    far = 16384.0
    own = pairs_of(num_tokens, 0)
    per_pair = (prefill_s(num_tokens, far) - prefill_s(num_tokens, 0)) / (pairs_of(num_tokens, far) - own)
    return max(0.0, per_pair) * own
