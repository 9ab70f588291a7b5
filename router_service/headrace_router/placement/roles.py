"""Which workers of role `both` compute prompts, beside workers that do nothing else: what the load asks for. Pure.

Such a worker can be the decode side of a pair, or take a sequence alone, prompt and output. While prompts find prefill
workers, all of them are decode sides, and nobody's prompt holds up their steps. When sequences wait for prefill
workers, and not for pages or slots, one more takes sequences alone; when that was not needed for a while, one less:

    pressure ≥ `_MORE` ──► one more on duty        pressure ≤ `_LESS` ──► one less

Pressure is the share of the last seconds in which somebody waited for a prefill worker, so the two bounds, and the time
between two changes, keep workers from changing sides with every burst.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from headrace_router.placement.capacity import WorkerView

_MORE, _LESS = 0.5, 0.1
_TIME_S = 2.0
"""In which pressure goes two thirds of the way to what it would be if nothing changed."""
_DWELL_S = 2.0
"""At least, between two changes."""


class Roles:
    """One router's. Mutated by what it is told."""

    def __init__(self) -> None:
        self.on_duty: frozenset[str] = frozenset()
        """Addresses of those that compute prompts, too."""
        self.pressure = 0.0
        self._is_pressed = False
        self._seen_s = math.nan
        self._changed_s = -math.inf

    def look(self, now_s: float, workers: Sequence[WorkerView]) -> list[WorkerView]:
        """Return the workers as a round is to see them."""
        boths = [worker for worker in workers if worker.can_prefill and worker.can_decode]
        has_prefills = any(not worker.can_decode for worker in workers)
        if not boths or not has_prefills:
            return list(workers)  # there is nobody to take prompts from them, or nobody to help
        self._settle(now_s, boths)
        return [replace(worker, takes_prompts=True) if worker.address in self.on_duty else worker for worker in workers]

    def on_round(self, now_s: float, *, is_pressed: bool) -> None:
        """Take note of whether a round left somebody waiting for a prefill worker alone."""
        self._pass(now_s)
        self._is_pressed = is_pressed

    def _settle(self, now_s: float, boths: Sequence[WorkerView]) -> None:
        self._pass(now_s)
        there = {worker.address for worker in boths}
        if now_s - self._changed_s < _DWELL_S:
            return
        on_duty, idle = self.on_duty & there, there - self.on_duty
        if self.pressure >= _MORE and idle:
            # Who has most room is disturbed least.
            freest = max((w for w in boths if w.address in idle), key=lambda w: (w.num_free_pages, w.address))
            self._change(now_s, on_duty | {freest.address})
        elif self.pressure <= _LESS and on_duty:
            fullest = min((w for w in boths if w.address in on_duty), key=lambda w: (w.num_free_pages, w.address))
            self._change(now_s, on_duty - {fullest.address})

    def _change(self, now_s: float, on_duty: frozenset[str]) -> None:
        self.on_duty, self._changed_s = on_duty, now_s
        self.pressure = (_MORE + _LESS) / 2  # what the change brings is to be seen first

    def _pass(self, now_s: float) -> None:
        if not math.isnan(self._seen_s) and now_s > self._seen_s:
            kept = math.exp((self._seen_s - now_s) / _TIME_S)
            self.pressure = self.pressure * kept + (1.0 - kept) * self._is_pressed
        self._seen_s = now_s
