"""How a step's tokens are shared out to lanes, which are computed at once: a step lasts as long as its fullest lane.

Each lane that has work is kept an even share of the budget, or what it wants if that is less; the rest goes to whoever
asks first. So the prompts of one lane never leave another idle, and one that is alone has all of it. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class StepBudget:
    """What is left of one step's tokens."""

    def __init__(self, num_tokens: int, work: Iterable[tuple[int, int]]) -> None:
        """Args: `work`: (lane, tokens) of each sequence that could be computed."""
        wanted: Counter[int] = Counter()
        for lane, count in work:
            wanted[lane] += count
        self.num_left = num_tokens
        share = num_tokens // max(len(wanted), 1)
        self._kept = {lane: min(count, share) for lane, count in wanted.items()}

    def left(self, lane: int) -> int:
        """Return how many tokens a sequence of `lane` may have: what is kept for other lanes is theirs."""
        return self.num_left - sum(count for other, count in self._kept.items() if other != lane)

    def take(self, lane: int, num_tokens: int) -> None:
        """Let a sequence of `lane` have `num_tokens`, at most what is `left` to it."""
        self.num_left -= num_tokens
        if lane in self._kept:
            self._kept[lane] = max(0, self._kept[lane] - num_tokens)
