"""Signs of life between two event loops.

HTTP/2 answers pings from gRPC's own threads while a process's event loop is dead: its streams stay open, its keepalive
is content, and nothing is said any more. So each end of a long call says something at least once a second, and each end
counts the seconds in which the other said nothing. They are counted in turns of one's own loop: a loop that was held up
itself has not heard the others, but that is not their silence.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

T = TypeVar("T")

BEAT_S = 1.0
"""Who has had nothing to say for so long sends a beat."""
MOST_QUIET_BEATS = 10
"""Who has heard nothing for so many of them ends the call: as long as a stopped process takes to be noticed."""


class Silence:
    """Calls `on_silent`, once, when the other end has been quiet for too long. Event loop only."""

    def __init__(
        self, on_silent: Callable[[], None], *, most_turns: int | None = None, turn_s: float | None = None
    ) -> None:
        """Args: too long is more than `most_turns` turns of `turn_s`; without them, as `Hold` and `Session` count."""
        self._on_silent = on_silent
        self._most_turns = MOST_QUIET_BEATS if most_turns is None else most_turns
        self._turn_s = BEAT_S if turn_s is None else turn_s
        self._num_quiet = 0
        self._loop = asyncio.get_running_loop()
        self._due_s = self._loop.time() + self._turn_s
        self._timer = self._loop.call_at(self._due_s, self._tick)

    def heard(self) -> None:
        """Take note that the other end said something, whatever it was."""
        self._num_quiet = 0

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._timer.cancel()

    def _tick(self) -> None:
        self._num_quiet += 1
        if self._num_quiet > self._most_turns:
            self._on_silent()
            return
        # A loop that is a little late catches up; one that was held up has half a turn at least to hear the other.
        self._due_s = max(self._due_s + self._turn_s, self._loop.time() + self._turn_s / 2)
        self._timer = self._loop.call_at(self._due_s, self._tick)


class Beat:
    """Says a beat whenever nothing was said for a while. Event loop only."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._loop = asyncio.get_running_loop()
        self._said_s = self._loop.time()
        self._timer = self._loop.call_later(BEAT_S, self._tick)

    def said(self) -> None:
        """Take note that something was said."""
        self._said_s = self._loop.time()

    def close(self) -> None:
        """Say nothing more. Idempotent."""
        self._timer.cancel()

    def _tick(self) -> None:
        due_s = self._said_s + BEAT_S
        if due_s <= self._loop.time():
            self._beat()
            due_s = self._loop.time() + BEAT_S
        self._timer = self._loop.call_at(due_s, self._tick)


class Outbox(Generic[T]):
    """What one end of a call has yet to say, in order, and a beat where there is nothing. Event loop only.

    Many put, one writer iterates; it ends after `close`, with the error given there, once what was put before is out.
    """

    def __init__(self, beat: T) -> None:
        self.period_s = BEAT_S
        self._beat = beat
        self._items: deque[T] = deque()
        self._news = asyncio.Event()
        self._is_closed = False
        self._error: Exception | None = None

    def put(self, item: T) -> None:
        """Say `item`; after `close` nobody hears it."""
        if not self._is_closed:
            self._items.append(item)
            self._news.set()

    def close(self, error: Exception | None = None) -> None:
        """Say nothing more. Idempotent: the first error counts."""
        if not self._is_closed:
            self._is_closed, self._error = True, error
            self._news.set()

    async def __aiter__(self) -> AsyncIterator[T]:
        while True:
            while self._items:
                yield self._items.popleft()
            if self._is_closed:
                if self._error is not None:
                    raise self._error
                return
            try:
                async with asyncio.timeout(self.period_s):
                    await self._news.wait()
                self._news.clear()
            except TimeoutError:
                yield self._beat
