"""Which experts tokens choose: uniform, Zipf, or as a histogram measured; and what it means for a step.

The model: a token chooses expert e with probability q_e, which sum to K, independently of other tokens. A step of M
tokens then reads an expected sum over e of 1 - (1 - q_e)^M distinct experts; uniform, E(1 - (1 - K/E)^M).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from headrace_core.expert_placement import balanced


@dataclass(frozen=True, slots=True)
class Routing:
    """How unevenly experts are chosen, and how they are placed on the ranks of an EP group.

    `zipf` is the exponent of expert popularity, 0: uniform. `histogram`, a measured count per expert, overrides it.
    Ranks get experts in order of index, a Zipf model's popularities being shuffled first, or `is_balanced`: packed so
    that loads are as even as whole experts allow, which is EPLB without replicas.
    """

    zipf: float = 0.0
    histogram: tuple[float, ...] = ()
    is_balanced: bool = False

    def probabilities(self, num_experts: int, num_experts_per_token: int) -> tuple[float, ...]:
        """Return q_e of each expert.

        Raises:
            ValueError: The histogram is of another number of experts, or counts nothing.
        """
        if self.histogram and (len(self.histogram) != num_experts or sum(self.histogram) <= 0):
            raise ValueError(
                f"the histogram has {len(self.histogram)} experts, the model {num_experts}; or it is all 0"
            )
        return _probabilities(self, num_experts, num_experts_per_token)

    def ranks(self, num_experts: int, num_experts_per_token: int, ep: int) -> tuple[tuple[float, ...], ...]:
        """Return q_e of the experts on each of `ep` ranks."""
        self.probabilities(num_experts, num_experts_per_token)
        return _ranks(self, num_experts, num_experts_per_token, ep)

    def imbalance(self, num_experts: int, num_experts_per_token: int, ep: int) -> float:
        """Return the busiest rank's load over the mean; 1: even."""
        loads = [sum(rank) for rank in self.ranks(num_experts, num_experts_per_token, ep)]
        return max(loads) * ep / sum(loads)

    def busiest(self, num_experts: int, num_experts_per_token: int, ep: int) -> tuple[float, ...]:
        """Return q_e of the experts on the rank that has the most to do."""
        return max(self.ranks(num_experts, num_experts_per_token, ep), key=sum)


UNIFORM = Routing()


def expected_distinct(probabilities: Sequence[float], num_tokens: float) -> float:
    """Return how many of these experts `num_tokens` tokens are expected to choose at least once."""
    first = probabilities[0]
    if all(q == first for q in probabilities):
        return len(probabilities) * (1 - (1 - first) ** num_tokens)
    return sum(1 - (1 - q) ** num_tokens for q in probabilities)


@lru_cache(maxsize=64)
def _probabilities(routing: Routing, num_experts: int, num_chosen: int) -> tuple[float, ...]:
    weights = list(routing.histogram) or [(rank + 1) ** -routing.zipf for rank in range(num_experts)]
    if not routing.histogram and routing.zipf:
        random.Random(0).shuffle(weights)
    # A token can't choose an expert twice: what exceeds 1 goes to the others in proportion.
    capped: set[int] = set()
    while True:
        rest = sum(weight for e, weight in enumerate(weights) if e not in capped)
        scale = (num_chosen - len(capped)) / rest if rest else 0.0
        over = {e for e, weight in enumerate(weights) if e not in capped and weight * scale > 1}
        if not over:
            return tuple(1.0 if e in capped else weight * scale for e, weight in enumerate(weights))
        capped |= over


@lru_cache(maxsize=256)
def _ranks(routing: Routing, num_experts: int, num_chosen: int, ep: int) -> tuple[tuple[float, ...], ...]:
    chosen = _probabilities(routing, num_experts, num_chosen)
    bounds = [num_experts * rank // ep for rank in range(ep + 1)]
    if not routing.is_balanced:
        return tuple(chosen[low:high] for low, high in pairwise(bounds))
    return tuple(tuple(chosen[expert] for expert in rank) for rank in balanced(chosen, ep).ranks)
