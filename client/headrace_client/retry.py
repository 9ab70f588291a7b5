"""When a request may be sent again: while nothing of its answer has come, and if the error says that it may help."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from headrace_core.errors import DeadlineError, HeadraceError, OverloadedError, UnavailableError

_WORTH_SAYING_S = 1.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how soon. Only `UnavailableError` and `OverloadedError` are retried, never after the first token.

    RETRIES_EXHAUSTED is not: the router has tried already, and a request that ends its workers must not go on doing so.

    The pause before try k + 1 is drawn evenly from 0 to `first_pause_s` * 2^(k - 1), at most `longest_pause_s`, so that
    many clients turned away together do not come back together; when the router says how long to stay away, that comes
    on top. `max_attempts` 1 turns retries off.

    No try begins later than `longest_wait_s` after the first one. A router that has no workers waits for them itself
    (30 s, its `--no-workers-timeout-s`): when it gives up, so does the client. How long a try may take that has begun
    is for the caller's `timeout_s` to say.
    """

    max_attempts: int = 4
    first_pause_s: float = 0.2
    longest_pause_s: float = 2.0
    longest_wait_s: float = 30.0


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
        self._began_s = clock()
        self._timeout_s = timeout_s
        self._num_made = 1
        self._last: HeadraceError | None = None

    def remaining_s(self) -> float | None:
        """Return how long the current try may take; None: as long as it likes."""
        return None if self._timeout_s is None else max(0.0, self._timeout_s - self._elapsed_s())

    def pause_after(self, error: HeadraceError) -> float:
        """Return how many seconds to wait before the next try.

        Raises:
            HeadraceError: `error` itself as `final` says it, when there is no next try.
        """
        policy = self._policy
        may_help = isinstance(error, UnavailableError | OverloadedError) and error.reason != "RETRIES_EXHAUSTED"
        if not may_help or self._num_made >= policy.max_attempts:
            raise self.final(error)
        longest_s = min(policy.longest_pause_s, policy.first_pause_s * 2 ** (self._num_made - 1))
        pause_s = longest_s * self._draw()
        if isinstance(error, OverloadedError):
            pause_s += min(error.retry_after_s, policy.longest_pause_s)
        remaining_s = self.remaining_s()
        is_late = self._elapsed_s() + pause_s > policy.longest_wait_s
        if is_late or (remaining_s is not None and remaining_s <= pause_s):
            raise self.final(error)
        self._num_made += 1
        self._last = error
        return pause_s

    def final(self, error: HeadraceError, *, has_answer: bool = False) -> HeadraceError:
        """Return the error as the caller gets it: the same object, changed to say how long was waited, and for what."""
        elapsed_s = self._elapsed_s()
        if isinstance(error, DeadlineError):
            missing = "the answer was complete" if has_answer else "anything of the answer came"
            said = f"the time limit passed before {missing}, after {elapsed_s:.1f} s"
            error.args = (said if self._last is None else f"{said}; the try before ended with: {self._last}",)
        elif isinstance(error, UnavailableError | OverloadedError) and not has_answer:
            if self._num_made > 1:
                error.args = (f"{error} (given up after {self._num_made} tries in {elapsed_s:.1f} s)",)
            elif elapsed_s >= _WORTH_SAYING_S:
                error.args = (f"{error} (given up after {elapsed_s:.1f} s)",)
        return error

    def _elapsed_s(self) -> float:
        return self._clock() - self._began_s
