"""A wait that somebody else may end, with an error of theirs. Event loop only."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from headrace_core.errors import HeadraceError


class EndableWait:
    """An async context manager, entered once: what is awaited inside ends when `end` is called, or the time is up.

    Leaving it raises the error given to `end`, also if what was awaited is done by then, or `TimeoutError`.
    """

    def __init__(self, limit_s: float | None = None) -> None:
        self.timer = asyncio.timeout(limit_s)
        """May be brought forward."""
        self._error: HeadraceError | None = None
        self._is_inside = False

    def end(self, error: HeadraceError) -> bool:
        """End the wait with `error`; return False if it has not begun or is over."""
        if not self._is_inside or self.timer.expired():
            return False
        self._error = error
        self.timer.reschedule(asyncio.get_running_loop().time())
        return True

    async def __aenter__(self) -> Self:
        await self.timer.__aenter__()
        self._is_inside = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_inside = False
        is_ended = error is None  # then the timer may not have run yet, but who called `end` counts on it
        try:
            await self.timer.__aexit__(kind, error, trace)
        except TimeoutError:
            if self._error is None:
                raise
            is_ended = True
        if is_ended and self._error is not None:
            raise self._error from None
