"""Turns for pulls: how many run at a time, and who is next."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Pulls:
    """Lets at most so many pulls run at a time; who waits with the lowest age goes first. Event loop only."""

    def __init__(self, most: int) -> None:
        self._num_free = most
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._tie = itertools.count()

    @asynccontextmanager
    async def turn(self, age: int) -> AsyncGenerator[None]:
        """Wait for a turn; it ends with the context."""
        if not self._num_free:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (age, next(self._tie), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_back()
                raise
        else:
            self._num_free -= 1
        try:
            yield
        finally:
            self._give_back()

    def _give_back(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1
