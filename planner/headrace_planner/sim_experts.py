"""Uneven experts: what chance adds to what a placement leaves uneven.

A layer's step waits for its busiest rank, so what counts is that rank's load over the mean (`expert_placement`).
"""

from __future__ import annotations

import numpy as np
from headrace_core.expert_placement import balanced, in_order
from headrace_core.roofline.routing import Routing


def sampled_imbalance(
    routing: Routing, *, num_experts: int, top_k: int, ep: int, tokens: int, redundant: int | None, seed: int = 0
) -> float:
    """Return the expected imbalance of steps of `tokens`, chance included: few tokens are uneven by themselves.

    `redundant` None: experts in order; a number: EPLB, planned from the probabilities, with so many replicas.
    """
    loads = routing.probabilities(num_experts, top_k)
    placed = in_order(num_experts, ep) if redundant is None else balanced(loads, ep, redundant=redundant)
    mean = np.array(placed.rank_loads(loads)) * tokens
    # Loads of ranks are near enough to independent: a token's k choices spread over many ranks.
    draws = np.random.default_rng(seed).poisson(mean, size=(64, ep))
    return float((draws.max(axis=1) / np.maximum(draws.mean(axis=1), 1e-9)).mean())
