"""When a sequence's first token will come: what the queue before it takes, then its own prompt. Pure: told the time.

The queue's pace is what was started per second while somebody waited, in the fair queue's costs. A prompt's time is a
line through those of the last prompts, from their start to their first token, by the tokens that were computed. What
was not measured yet is taken for nothing: nobody is refused for a guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from headrace_router.placement.capacity import Waiting, WorkerView
from headrace_router.placement.line import Line

_HALF_LIFE_S = 10.0
_LEAST_BUSY_S = 0.2
"""Of waiting that was seen, before it says how fast the queue is."""


class Forecast:
    """Of one queue. Mutated by what it is told."""

    def __init__(self) -> None:
        self.prompts = Line()
        """Of prompts that were handed over, or computed where they run: start to first token, by tokens computed."""
        self._seen_s = math.nan
        self._busy_s = 0.0
        self._cost = 0.0
        self._is_waiting = False

    def on_round(self, now_s: float, started_cost: float, *, is_waiting: bool) -> None:
        """Take note of a planning round: what it started, and whether it left anybody waiting."""
        self._pass(now_s)
        if self._is_waiting:  # what nobody waited for says nothing of how fast the queue is
            self._cost += started_cost
        self._is_waiting = is_waiting

    def on_first_token(self, num_computed: int, after_s: float) -> None:
        """Take note of a first token: of how many prompt tokens it took, and how long after it was started."""
        self.prompts.observe(num_computed, after_s)

    def prompt_s(self, num_tokens: int) -> float:
        """Return how long a prompt takes from its start to its first token; 0 if that is not known."""
        return self.prompts.at(num_tokens) if self.prompts.is_known else 0.0

    def wait_s(self, now_s: float, ahead_cost: float, own_cost: float) -> float:
        """Return how long a sequence waits that has so much before it; 0 if that is not known."""
        self._pass(now_s)
        if not ahead_cost or self._busy_s < _LEAST_BUSY_S:
            return 0.0
        # Its own counts as if it had been served: of a queue that has just begun to move nothing worse is said.
        return ahead_cost * self._busy_s / (self._cost + own_cost)

    def _pass(self, now_s: float) -> None:
        elapsed_s = 0.0 if math.isnan(self._seen_s) else max(0.0, now_s - self._seen_s)
        self._seen_s = now_s
        kept = 0.5 ** (elapsed_s / _HALF_LIFE_S)
        self._cost *= kept
        self._busy_s = self._busy_s * kept + (elapsed_s if self._is_waiting else 0.0)


def num_lacking(waiting: Waiting, workers: Sequence[WorkerView]) -> int:
    """Return the prompt tokens that the worker would compute whose cache has most of them."""
    prefills = (worker for worker in workers if worker.can_prefill)
    cached = max((waiting.prefix.num_cached_tokens(worker.cached, worker.page_size) for worker in prefills), default=0)
    return max(1, waiting.num_tokens - max(cached, waiting.num_cached_tokens))


def shortest_step_s(workers: Sequence[WorkerView]) -> float:
    """Return the shortest time of a decode side's steps; 0 if one is not known, or there is none."""
    return min((worker.step_s for worker in workers if worker.can_decode), default=0.0)
