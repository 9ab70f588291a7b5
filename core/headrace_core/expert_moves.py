"""Whether experts are to move, and where to: judged by what each got of late.

A *slot* is a place on a rank for one expert's weights; in a group that moves experts all ranks have as many, and all
are taken. Loss is the share of the experts' time in which ranks wait for the busiest: 1 - mean / busiest, of sums over
layers, by tokens. In time it is `as_time_more` more; a loss of a quarter is a third more time.

Pure: what decides is here, what is decided is the same for whoever asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace_core.expert_placement import Placement, balanced

Slots = tuple[tuple[int, ...], ...]
"""For each rank the experts in its slots, in the order of the slots."""

LEAST_GAIN = 0.05
"""By how much the loss must fall: less is not worth its bytes, and may be chance."""
LEAST_TOKENS = 64
"""Choices that an expert of a layer must have had on average: with fewer, chance is most of what is uneven."""
_LEAST_OF_LAYER = 0.01
"""Of a layer's busiest rank, to move its experts at all."""


@dataclass(frozen=True, slots=True)
class Network:
    """What placements depend on beside loads: see `balanced`."""

    num_groups: int = 1
    num_nodes: int = 1


@dataclass(frozen=True, slots=True)
class Decision:
    """Where experts are to be, by layer, those first that win most; none: nothing moves. Loss now, and then."""

    layers: Mapping[int, Slots]
    loss_now: float
    loss_then: float


def decide(
    loads: Mapping[int, Sequence[float]],
    slots: Mapping[int, Slots],
    network: Network | None = None,
    *,
    least_gain: float = LEAST_GAIN,
) -> Decision:
    """Return what is to move.

    Nothing does if the loss would not fall by `least_gain` altogether, so what was moved stays until loads are others;
    and no layer does whose busiest rank would not have less to do.

    Args:
        loads: of each expert, by layer, all of which `slots` has.
        slots: of each layer.
        network: None: one group, one node.
        least_gain: share of the experts' time.
    """
    network = network or Network()
    found: dict[int, tuple[float, Slots]] = {}
    ranks_then: list[list[float]] = []
    for layer, of_layer in loads.items():
        now = slots[layer]
        ranks_now = rank_loads(of_layer, now)
        redundant = sum(map(len, now)) - len(of_layer)
        placed = balanced(
            of_layer, len(now), redundant=redundant, num_groups=network.num_groups, num_nodes=network.num_nodes
        )
        then = placed.rank_loads(of_layer)
        is_less = max(then) < max(ranks_now) * (1 - _LEAST_OF_LAYER)
        ranks_then.append(then if is_less else ranks_now)
        if is_less:
            found[layer] = (max(ranks_now) - max(then), settled(now, placed, network.num_nodes))
    loss_now, loss_then = loss(loads, slots), loss_of_ranks(ranks_then)
    if loss_now - loss_then < least_gain:
        return Decision({}, loss_now, loss_now)
    by_gain = sorted(found, key=lambda layer: (-found[layer][0], layer))
    return Decision({layer: found[layer][1] for layer in by_gain}, loss_now, loss_then)


def is_enough(loads: Mapping[int, Sequence[float]], least_tokens: float = LEAST_TOKENS) -> bool:
    """Return whether experts of every layer got enough for more than chance to show."""
    return bool(loads) and all(sum(of_layer) >= least_tokens * len(of_layer) for of_layer in loads.values())


def loss(loads: Mapping[int, Sequence[float]], slots: Mapping[int, Slots]) -> float:
    """Return the share of the experts' time that ranks wait for the busiest; 0 if there was nothing to do."""
    return loss_of_ranks([rank_loads(of_layer, slots[layer]) for layer, of_layer in loads.items()])


def loss_of_ranks(of_layers: Iterable[Sequence[float]]) -> float:
    """Return the same of each rank's load in each layer."""
    pairs = [(sum(of_ranks) / len(of_ranks), max(of_ranks)) for of_ranks in of_layers]
    busiest = sum(most for _, most in pairs)
    return max(0.0, 1 - sum(mean for mean, _ in pairs) / busiest) if busiest else 0.0


def as_time_more(share: float) -> float:
    """Return how much more time a loss of `share` of the time is: 1/4 is 1/3 more."""
    return share / (1 - share)


def rank_loads(loads: Sequence[float], slots: Slots) -> list[float]:
    """Return each rank's load in a layer; replicas share evenly."""
    return Placement(slots).rank_loads(loads)


def settled(before: Slots, placed: Placement, num_nodes: int = 1) -> Slots:
    """Return `placed` as slots in which as much as may be is where it is in `before`.

    Ranks of a node are alike, so each gets that of its node's shares of which it has most, those that agree most first;
    what stays keeps its slot. `before` and `placed` have as many ranks, and each as many experts.
    """
    width = len(before) // num_nodes
    after: list[tuple[int, ...]] = [()] * len(before)
    for node in range(num_nodes):
        ranks = range(node * width, (node + 1) * width)
        shares = {rank: set(placed.ranks[rank]) for rank in ranks}
        pairs = sorted(
            ((rank, share) for rank in ranks for share in ranks),
            key=lambda pair: (-len(shares[pair[1]].intersection(before[pair[0]])), pair),
        )
        free, left = set(ranks), set(ranks)
        for rank, share in pairs:
            if rank in free and share in left:
                free.remove(rank)
                left.remove(share)
                after[rank] = _in_slots(before[rank], shares[share])
    return tuple(after)


def arrivals(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return the slots of a rank that get an expert which the rank had in none."""
    had = set(before)
    return [slot for slot, expert in enumerate(after) if expert not in had]


def _in_slots(before: Sequence[int], experts: set[int]) -> tuple[int, ...]:
    coming = iter(sorted(experts.difference(before)))
    return tuple(expert if expert in experts else next(coming) for expert in before)
