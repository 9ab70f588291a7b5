"""When a request may be sent again: while nothing of its answer has come, and if the error says that it may help."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from headrace_core.errors import HeadraceError, OverloadedError, UnavailableError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how soon. Only `UnavailableError` and `OverloadedError` are retried, never after the first token.

    RETRIES_EXHAUSTED is not: the router has tried already, and a request that ends its workers must not go on doing so.

    The pause before try k + 1 is drawn evenly from 0 to `first_pause_s` * 2^(k - 1), at most `longest_pause_s`, so that
    many clients turned away together do not come back together; when the router says how long to stay away, that comes
    on top. `max_attempts` 1 turns retries off.
    """

    max_attempts: int = 4
    first_pause_s: float = 0.2
    longest_pause_s: float = 2.0


class Attempts:
    """The tries of one request, within one deadline. `draw` and `clock` are arguments for tests."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float | None,
        *,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._draw = draw
        self._clock = clock
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._num_made = 1

    def remaining_s(self) -> float | None:
        """Return how long the current try may take; None: as long as it likes."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def pause_after(self, error: HeadraceError) -> float:
        """Return how many seconds to wait before the next try.

        Raises:
            HeadraceError: `error` itself, when there is no next try.
        """
        policy = self._policy
        may_help = isinstance(error, UnavailableError | OverloadedError) and error.reason != "RETRIES_EXHAUSTED"
        if not may_help or self._num_made >= policy.max_attempts:
            raise error
        longest_s = min(policy.longest_pause_s, policy.first_pause_s * 2 ** (self._num_made - 1))
        pause_s = longest_s * self._draw()
        if isinstance(error, OverloadedError):
            pause_s += min(error.retry_after_s, policy.longest_pause_s)
        remaining_s = self.remaining_s()
        if remaining_s is not None and remaining_s <= pause_s:
            raise error
        self._num_made += 1
        return pause_s
