"""Simulated time: a heap of what happens next. Ties happen in the order in which they were scheduled."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """`now_s` starts at 0 and moves only in `run`."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._count = 0

    def after(self, delay_s: float, action: Callable[[Any], None], argument: Any = None) -> None:
        """Call `action(argument)` in `delay_s` seconds."""
        self._count += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._count, action, argument))

    def at(self, time_s: float, action: Callable[[Any], None], argument: Any = None) -> None:
        """Call `action(argument)` at `time_s`, which is not in the past."""
        self._count += 1
        heapq.heappush(self._heap, (time_s, self._count, action, argument))

    @property
    def num_events(self) -> int:
        """Actions that were called."""
        return self._count - len(self._heap)

    def run(self) -> None:
        """Go on until nothing is left to happen."""
        heap, pop = self._heap, heapq.heappop
        while heap:
            self.now_s, _, action, argument = pop(heap)
            action(argument)
