"""Which workers get new sequences, by what became of the last ones there: a circuit breaker for each. Pure.

    CLOSED ── `MOST_FAILURES` in a row ──► OPEN ── its pause is over ──► HALF_OPEN ── a probe succeeds ──► CLOSED
                                            ▲                               │
                                            └── it fails; the next pause is twice as long

Half-open it gets one sequence at a time. One that goes wrong soon after that opens it at once. What began before it
opened counts for nothing while it is open. A failure is the worker's own, or it is none of this one's business: the
partner of a worker that failed is not blamed, nor is anybody for what lies between two.

The last worker of its side gets work whatever its circuit says, for there is nobody better.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Protocol, TypeVar

MOST_FAILURES = 5
"""In a row, without a success between them, before it opens."""
FIRST_PAUSE_S = 1.0
MOST_PAUSE_S = 30.0
_SPREAD = 0.2
"""Of a pause, either way: several routers are not to probe at the same moment."""


class Circuit(Enum):
    """See the module; the values are `WorkerStatus.circuit`'s."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """One worker's, by its address. Mutated by what it is told; the time is told, too."""

    def __init__(self, draw: Callable[[float, float], float] = random.uniform) -> None:
        """Args: `draw` returns a number between two."""
        self.last_reason = ""
        """Of the last failure that counted."""
        self._draw = draw
        self._num_failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._until_s: float | None = None
        """While it is not closed: when a probe may begin."""
        self._probe: object | None = None
        """The sequence that is to show whether the worker is well."""

    def circuit(self, now_s: float) -> Circuit:
        """Return where it stands."""
        if self._until_s is None:
            return Circuit.CLOSED
        return Circuit.OPEN if now_s < self._until_s else Circuit.HALF_OPEN

    def admits(self, now_s: float) -> bool:
        """Return whether the worker gets a sequence now."""
        circuit = self.circuit(now_s)
        return circuit is Circuit.CLOSED or (circuit is Circuit.HALF_OPEN and self._probe is None)

    def left_s(self, now_s: float) -> float:
        """Return how long it stays open."""
        return max(0.0, (self._until_s or 0.0) - now_s)

    def on_start(self, sequence: object, now_s: float) -> None:
        """A sequence begins at the worker."""
        if self._probe is None and self.circuit(now_s) is Circuit.HALF_OPEN:
            self._probe = sequence

    def on_over(self, sequence: object) -> None:
        """A sequence is over at the worker, however; if it was the probe, another one may be."""
        if sequence is self._probe:
            self._probe = None

    def on_success(self, now_s: float) -> None:
        """The worker did what it was asked."""
        match self.circuit(now_s):
            case Circuit.CLOSED:
                self._num_failures, self._pause_s = 0, FIRST_PAUSE_S
            case Circuit.HALF_OPEN:
                self._until_s = self._probe = None
                self._num_failures = MOST_FAILURES - 1
            case Circuit.OPEN:
                pass

    def on_failure(self, reason: str, now_s: float) -> bool:
        """The worker failed; return True if that opened it."""
        circuit = self.circuit(now_s)
        if circuit is Circuit.OPEN:
            return False
        self.last_reason = reason
        self._num_failures += 1
        if circuit is Circuit.CLOSED and self._num_failures < MOST_FAILURES:
            return False
        self._until_s = now_s + self._pause_s * self._draw(1 - _SPREAD, 1 + _SPREAD)
        self._pause_s = min(2 * self._pause_s, MOST_PAUSE_S)
        self._probe = None
        return True


class Broken(Protocol):
    """A worker with a breaker."""

    can_prefill: bool
    can_decode: bool
    breaker: Breaker


B = TypeVar("B", bound=Broken)


def admitted(takers: Iterable[B], fleet: Sequence[B], now_s: float) -> list[B]:
    """Return those that get new sequences now, of the `takers` among a fleet.

    Where nobody of the fleet is admitted on a side, all of that side are.
    """
    well = [worker for worker in fleet if worker.breaker.admits(now_s)]
    can_prefill = any(worker.can_prefill for worker in well)
    can_decode = any(worker.can_decode for worker in well)
    return [
        worker
        for worker in takers
        if worker.breaker.admits(now_s)
        or (worker.can_prefill and not can_prefill)
        or (worker.can_decode and not can_decode)
    ]
