"""How much of a kind may come in a while: what one worker sends is bounded, as what one client sends is."""

from __future__ import annotations

import time
from collections.abc import Callable

from headrace_core.errors import ProtocolError


class Pace:
    """Lets `burst` pass at once and `per_s` every second after. `clock` is an argument for tests."""

    def __init__(self, what: str, *, per_s: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._per_s = per_s
        self._burst = self._left = burst
        self._clock = clock
        self._seen_s = clock()

    def take(self, cost: float = 1.0) -> None:
        """Count something that came.

        Raises:
            ProtocolError: PROTOCOL, it is too much.
        """
        now_s = self._clock()
        self._left = min(self._burst, self._left + (now_s - self._seen_s) * self._per_s) - cost
        self._seen_s = now_s
        if self._left < 0:
            raise ProtocolError(
                "PROTOCOL", f"it sends more than {self._per_s:g} {self._what} a second, and {self._burst:g} at once"
            )
