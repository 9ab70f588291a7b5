"""Which rank holds which experts: as numbered, or so that ranks have as much to do, with copies of the busiest (EPLB).

A layer's step waits for its busiest rank, so what counts is its load over the mean. Pure: planner, roofline and the
ranks of a model place by these functions. Source: deepseek-ai/EPLB, `rebalance_experts`; swaps at the end are ours.

Loads are what each expert gets, in any unit; its replicas share it evenly. A *slot* is a place for one expert's
weights. No rank has two replicas of one expert: the second would take memory and no load off anybody.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LEAST_GAIN = 1e-9
"""Of the busiest rank's load, for a swap: less is rounding."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The experts of each rank, rising."""

    ranks: tuple[tuple[int, ...], ...]

    def owners(self) -> tuple[tuple[int, ...], ...]:
        """Return for each expert the ranks that hold it, rising."""
        found: dict[int, list[int]] = {}
        for rank, experts in enumerate(self.ranks):
            for expert in experts:
                found.setdefault(expert, []).append(rank)
        return tuple(tuple(found[expert]) for expert in range(len(found)))

    def rank_loads(self, loads: Sequence[float]) -> list[float]:
        """Return each rank's load, from each expert's."""
        shares = _shares(loads, [len(ranks) for ranks in self.owners()])
        return [sum(shares[expert] for expert in experts) for experts in self.ranks]

    def imbalance(self, loads: Sequence[float]) -> float:
        """Return the busiest rank's load over the mean; 1: even, or nothing to do."""
        of_ranks = self.rank_loads(loads)
        return max(of_ranks) * len(of_ranks) / sum(of_ranks) if sum(of_ranks) else 1.0


def in_order(num_experts: int, num_ranks: int, redundant: int = 0) -> Placement:
    """Place experts as numbered: E / R neighbours on each rank, and behind them its share of `redundant` replicas.

    Raises:
        ValueError: more replicas than would differ, or no share of them for each rank.
    """
    _check_redundant(redundant, num_experts, num_ranks)
    if redundant % num_ranks:
        raise ValueError(f"{redundant} replicas do not divide among {num_ranks} ranks")
    bounds = [num_experts * rank // num_ranks for rank in range(num_ranks + 1)]
    runs = (range(bounds[rank], bounds[rank + 1] + redundant // num_ranks) for rank in range(num_ranks))
    return Placement(tuple(tuple(sorted(expert % num_experts for expert in run)) for run in runs))


def balanced(
    loads: Sequence[float], num_ranks: int, *, redundant: int = 0, num_groups: int = 1, num_nodes: int = 1
) -> Placement:
    """Place experts for even load, with `redundant` replicas in all.

    The busiest experts get replicas, one after another; slots are placed heaviest first onto the least busy rank that
    has room; then pairs are swapped while that relieves the busiest. With several nodes, of which each gets as many of
    the router's `num_groups` groups of neighbours, groups stay whole on a node, and replicas with them: a token whose
    experts are of few groups then travels to few nodes (hierarchical). Otherwise over all ranks at once (global).

    Args:
        loads: of each expert.
        num_ranks: R.
        redundant: slots beyond one for each expert.
        num_groups: of the router's choice.
        num_nodes: that the ranks are on, as many on each, in order.

    Raises:
        ValueError: more replicas than would differ, or ranks that do not divide among nodes.
    """
    count = len(loads)
    _check_redundant(redundant, count, num_ranks)
    if num_nodes < 1 or num_ranks % num_nodes:
        raise ValueError(f"{num_ranks} ranks do not divide among {num_nodes} nodes")
    if num_nodes == 1 or num_groups % num_nodes or count % num_groups or redundant % num_nodes:
        placed = Placement(_placed(range(count), loads, num_ranks, redundant))
        if redundant or count % num_ranks:
            return placed
        # Heaviest first is near the best, not always there: nobody moves for less than what is there already.
        return min(in_order(count, num_ranks), placed, key=lambda placement: placement.imbalance(loads))
    width = count // num_groups
    group_loads = [sum(loads[group * width : (group + 1) * width]) for group in range(num_groups)]
    ranks: list[tuple[int, ...]] = []
    for groups in _placed(range(num_groups), group_loads, num_nodes, 0):
        experts = [expert for group in groups for expert in range(group * width, (group + 1) * width)]
        ranks += _placed(experts, loads, num_ranks // num_nodes, redundant // num_nodes)
    return Placement(tuple(ranks))


def _check_redundant(redundant: int, num_experts: int, num_ranks: int) -> None:
    most = num_experts * (num_ranks - 1)
    if not 0 <= redundant <= most:
        raise ValueError(f"{redundant} replicas of {num_experts} experts on {num_ranks} ranks: 0 to {most}")


def _placed(
    experts: Iterable[int], loads: Sequence[float], num_ranks: int, redundant: int
) -> tuple[tuple[int, ...], ...]:
    """Return the experts of each of `num_ranks` ranks, of `experts` alone and with as many replicas."""
    experts = list(experts)
    copies = dict(zip(experts, _copies([loads[expert] for expert in experts], redundant, num_ranks), strict=True))
    shares = {expert: loads[expert] / copies[expert] for expert in experts}
    slots = sorted((e for e in experts for _ in range(copies[e])), key=lambda expert: (-shares[expert], expert))
    room = -(-len(slots) // num_ranks)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert in slots:
        _put(ranks, expert, room, shares)
    _swap(ranks, shares)
    return tuple(tuple(sorted(rank)) for rank in ranks)


def _copies(loads: Sequence[float], redundant: int, most: int) -> list[int]:
    """Return how many slots each expert gets: one more, again and again, where a slot has most to do; `most` each."""
    copies = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(redundant):
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        if copies[expert] < most:
            heapq.heappush(heap, (-loads[expert] / copies[expert], expert))
    return copies


def _put(ranks: list[list[int]], expert: int, room: int, shares: dict[int, float]) -> None:
    """Put `expert` on the least busy rank that has room and has it not."""
    by_load = sorted(range(len(ranks)), key=lambda rank: (sum(shares[e] for e in ranks[rank]), rank))
    for rank in by_load:
        if len(ranks[rank]) < room and expert not in ranks[rank]:
            ranks[rank].append(expert)
            return
    # All that have room have it. One without it gives them another expert and takes this one.
    for rank in by_load:
        for other in by_load:
            movable = [e for e in ranks[rank] if e not in ranks[other]]
            if expert not in ranks[rank] and len(ranks[other]) < room and movable:
                moved = min(movable, key=lambda e: (shares[e], e))
                ranks[rank].remove(moved)
                ranks[other].append(moved)
                ranks[rank].append(expert)
                return
    raise AssertionError("an expert has no more slots than there are ranks")


def _swap(ranks: list[list[int]], shares: dict[int, float]) -> None:
    """Swap two slots, of the busiest rank and another, as long as some swap leaves both less busy than that was."""
    loads = [sum(shares[expert] for expert in rank) for rank in ranks]
    while True:
        busiest = loads.index(max(loads))
        best = _best_swap(ranks, shares, loads, busiest)
        if best is None:
            return
        other, mine, theirs = best
        ranks[busiest].remove(mine)
        ranks[other].remove(theirs)
        ranks[busiest].append(theirs)
        ranks[other].append(mine)
        for rank in (busiest, other):
            loads[rank] = sum(shares[expert] for expert in ranks[rank])


def _best_swap(
    ranks: list[list[int]], shares: dict[int, float], loads: list[float], busiest: int
) -> tuple[int, int, int] | None:
    """Return (other rank, expert of the busiest, expert of the other) after which the busier of both is least busy."""
    least, best = loads[busiest] * (1 - _LEAST_GAIN), None
    for other, experts in enumerate(ranks):
        for mine in ranks[busiest]:
            for theirs in experts:
                gain = shares[mine] - shares[theirs]
                after = max(loads[busiest] - gain, loads[other] + gain)
                if after < least and mine not in experts and theirs not in ranks[busiest]:
                    least, best = after, (other, mine, theirs)
    return best


def _shares(loads: Sequence[float], copies: Sequence[int]) -> list[float]:
    return [load / count for load, count in zip(loads, copies, strict=True)]
