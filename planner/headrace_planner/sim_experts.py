"""Uneven experts, and EPLB, which evens them out: what the busiest rank of an expert-parallel group has to do.

A layer's step waits for its busiest rank, so what counts is the busiest rank's load over the mean (`imbalance`). With
`redundant` slots the most loaded experts get replicas, each of which takes an equal part of its expert's tokens; then
slots are packed onto ranks, heaviest first onto the least loaded rank that has room.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from headrace_core.roofline.routing import Routing


@dataclass(frozen=True, slots=True)
class Placement:
    """Where experts are. `ranks[r]` are (expert, load) of each slot on rank r; loads sum to the experts per token."""

    ranks: tuple[tuple[tuple[int, float], ...], ...]

    @property
    def loads(self) -> tuple[float, ...]:
        """Each rank's load."""
        return tuple(sum(load for _, load in rank) for rank in self.ranks)

    @property
    def imbalance(self) -> float:
        """Busiest rank over the mean; 1: even."""
        loads = self.loads
        return max(loads) * len(loads) / sum(loads)


def in_order(loads: Sequence[float], ep: int) -> Placement:
    """Place experts by index, as a checkpoint has them: `E/ep` neighbours on each rank."""
    slots = list(enumerate(loads))
    bounds = [len(slots) * rank // ep for rank in range(ep + 1)]
    return Placement(tuple(tuple(slots[bounds[r] : bounds[r + 1]]) for r in range(ep)))


def balanced(loads: Sequence[float], ep: int, *, redundant: int = 0) -> Placement:
    """Place experts for even load, with `redundant` replicas in all: EPLB.

    Source: deepseek-ai/EPLB, `rebalance_experts` without the node hierarchy.
    """
    slots = sorted(_replicate(loads, redundant), key=lambda slot: (-slot[1], slot[0]))
    room = -(-len(slots) // ep)
    ranks: list[list[tuple[int, float]]] = [[] for _ in range(ep)]
    heap = [(0.0, rank) for rank in range(ep)]
    for slot in slots:
        load, rank = heapq.heappop(heap)
        ranks[rank].append(slot)
        if len(ranks[rank]) < room:
            heapq.heappush(heap, (load + slot[1], rank))
    return Placement(tuple(tuple(rank) for rank in ranks))


def sampled_imbalance(
    routing: Routing, *, num_experts: int, top_k: int, ep: int, tokens: int, redundant: int | None, seed: int = 0
) -> float:
    """Return the expected imbalance of steps of `tokens`, chance included: few tokens are uneven by themselves.

    `redundant` None: experts in order; a number: EPLB, planned from the probabilities, with so many replicas.
    """
    loads = routing.probabilities(num_experts, top_k)
    placed = in_order(loads, ep) if redundant is None else balanced(loads, ep, redundant=redundant)
    mean = np.array(placed.loads) * tokens
    # Loads of ranks are near enough to independent: a token's k choices spread over many ranks.
    draws = np.random.default_rng(seed).poisson(mean, size=(64, ep))
    return float((draws.max(axis=1) / np.maximum(draws.mean(axis=1), 1e-9)).mean())


def _replicate(loads: Sequence[float], redundant: int) -> list[tuple[int, float]]:
    """Give replicas, one after the other, to the expert whose slots have most to do."""
    copies = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(redundant):
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        heapq.heappush(heap, (-loads[expert] / copies[expert], expert))
    return [(expert, loads[expert] / count) for expert, count in enumerate(copies) for _ in range(count)]
