"""What uneven experts cost, and what a rebalance would win: by the functions that workers and the planner place by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace_core.errors import InvalidRequestError
from headrace_core.expert_moves import as_time_more, loss_of_ranks
from headrace_core.expert_placement import balanced, in_order

from headrace_client.experts.counted import PARTS, Counted


@dataclass(frozen=True, slots=True)
class Placed:
    """Experts in some place: each rank's tokens by layer, and the share of the experts' time that ranks wait."""

    rank_tokens: Mapping[int, Sequence[float]]
    loss: float

    @property
    def time_more(self) -> float:
        """How much longer experts take than if ranks were even; as much more they would do if they were."""
        return as_time_more(self.loss)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: each rank's seconds by `PARTS`, as they are and if ranks computed as much each."""

    now: tuple[tuple[float, ...], ...]
    ideal: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Outlook:
    """For `num_ranks`: `now` is measured where `is_measured`, else experts lie as numbered.

    `rebalanced` has `num_slots` of each layer. `step` None: no group measures it.
    """

    num_ranks: int
    num_slots: int
    is_measured: bool
    now: Placed
    rebalanced: Placed
    step: Step | None


def outlook(counted: Counted, num_ranks: int | None, redundant: int | None) -> Outlook:
    """Return it for a group of `num_ranks`, None: the worker's own, 4 if it is no group; with `redundant` copies.

    None: as many as the worker has room for, or one for each rank.

    Raises:
        InvalidRequestError: BAD_OPTION, there can't be so many ranks or copies.
    """
    is_group = counted.num_ranks > 1
    ranks = num_ranks or (counted.num_ranks if is_group else 4)
    num_experts = max(map(len, counted.tokens.values()))
    if ranks > num_experts:
        raise InvalidRequestError("BAD_OPTION", f"--ranks {ranks}: there are {num_experts} experts for them")
    if redundant is None:
        has_room = counted.num_slots >= num_experts and ranks == counted.num_ranks
        redundant = counted.num_slots - num_experts if has_room else ranks
    try:
        after = {layer: balanced(loads, ranks, redundant=redundant).rank_loads(loads)
                 for layer, loads in counted.tokens.items()}  # fmt: skip
    except ValueError as error:
        raise InvalidRequestError("BAD_OPTION", f"--redundant {redundant}: {error}") from None
    is_measured = bool(counted.rank_tokens) and ranks == counted.num_ranks
    now = counted.rank_tokens if is_measured and counted.rank_tokens else {
        layer: in_order(len(loads), ranks).rank_loads(loads) for layer, loads in counted.tokens.items()
    }  # fmt: skip
    step = _step(counted) if ranks == counted.num_ranks and len(counted.parts) == ranks else None
    return Outlook(ranks, num_experts + redundant, is_measured, _placed(now), _placed(after), step)


def _placed(rank_tokens: Mapping[int, Sequence[float]]) -> Placed:
    return Placed(rank_tokens, loss_of_ranks(rank_tokens.values()))


def _step(counted: Counted) -> Step | None:
    """Return an average step: the ranks' shares of it, of the time that rank 0 takes for one."""
    totals = [sum(rank) for rank in counted.parts]
    if counted.step_s is None or not all(totals):
        return None
    now = tuple(
        tuple(part / total * counted.step_s for part in rank) for rank, total in zip(counted.parts, totals, strict=True)
    )
    means = [sum(rank[part] for rank in now) / len(now) for part in range(len(PARTS))]
    return Step(now, ((means[0], means[1], 0.0),) * len(now))
