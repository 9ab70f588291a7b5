"""Amounts that callers share, so that none of them can take all.

A caller gets more while it holds no more than what is left: alone it gets half, with others less, and something is
always left for the next. Names can be made up and addresses can't, so callers at one address together get at most
three quarters. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

_ADDRESS_FACTOR = 3


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call."""

    name: str
    """Whose share it is; the address, unless the caller says more of itself."""
    address: str
    """The host it calls from, without port; or whatever else of it can't be made up: its certificate, its API key."""


class Pot:
    """An amount of anything that can be counted."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken = 0
        self._by_name: Counter[str] = Counter()
        self._by_address: Counter[str] = Counter()

    @property
    def left(self) -> int:
        """What nobody holds."""
        return self.total - self.taken

    def held(self, caller: Caller) -> int:
        """Return what `caller` holds."""
        return self._by_name[caller.name]

    def take(self, caller: Caller, amount: int = 1) -> bool:
        """Give `amount` to `caller`, unless that is more than its share or its address's: then return False."""
        left = self.left
        if self._by_name[caller.name] + amount > left:
            return False
        if self._by_address[caller.address] + amount > _ADDRESS_FACTOR * left:
            return False
        self.taken += amount
        self._by_name[caller.name] += amount
        self._by_address[caller.address] += amount
        return True

    def give_back(self, caller: Caller, amount: int = 1) -> None:
        """Take back what `take` gave."""
        self.taken -= amount
        for counter, key in ((self._by_name, caller.name), (self._by_address, caller.address)):
            counter[key] -= amount
            assert counter[key] >= 0, "given back more than was taken"
            if not counter[key]:
                del counter[key]


class Turns:
    """So many may do something at a time, shared like a pot; the others wait, each caller in a line of its own.

    While somebody waits for it, a turn lasts `patience_s` at most. A line is served in order, until its first has
    waited that long: then somebody keeps turns for nothing, and the newest call is the likeliest to be an honest one.
    """

    def __init__(self, total: int, *, patience_s: float) -> None:
        self._pot = Pot(total)
        self._patience_s = patience_s
        self._lines: dict[Caller, deque[tuple[asyncio.Future[None], float]]] = {}
        """Who waits, and since when."""
        self._begun: dict[asyncio.Timeout, tuple[Caller, float]] = {}
        """Turns under way: whose, and since when."""

    @asynccontextmanager
    async def turn(self, caller: Caller, timer: asyncio.Timeout) -> AsyncGenerator[None]:
        """Wait for a turn and hold it.

        Args:
            caller: whose turn.
            timer: an entered timeout around this and what is done in the turn; brought forward when others wait.
        """
        if not self._pot.take(caller):
            await self._wait(caller)
        now_s = asyncio.get_running_loop().time()
        self._begun[timer] = (caller, now_s)
        if caller in self._lines or (self._lines and not self._pot.left):
            self._hurry(timer, now_s)
        try:
            yield
        finally:
            del self._begun[timer]
            self._end(caller)

    async def _wait(self, caller: Caller) -> None:
        is_own_share = self._pot.left > 0
        for timer, (other, begun_s) in self._begun.items():
            if other == caller or not is_own_share:
                self._hurry(timer, begun_s)
        line = self._lines.setdefault(caller, deque())
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        entry = (turn, loop.time())
        line.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end(caller)
            elif entry in line:
                line.remove(entry)
                self._drop_empty(caller)
            raise

    def _hurry(self, timer: asyncio.Timeout, begun_s: float) -> None:
        until_s = max(begun_s + self._patience_s, asyncio.get_running_loop().time())
        when_s = timer.when()
        if not timer.expired() and (when_s is None or until_s < when_s):
            timer.reschedule(until_s)

    def _end(self, caller: Caller) -> None:
        self._pot.give_back(caller)
        now_s = asyncio.get_running_loop().time()
        for waiting in list(self._lines):
            line = self._lines[waiting]
            was_served = False
            while line and self._pot.take(waiting):
                is_in_time = now_s - line[0][1] < self._patience_s
                turn, _ = line.popleft() if is_in_time else line.pop()
                if turn.done():  # cancelled, and its task has not run yet
                    self._pot.give_back(waiting)
                else:
                    turn.set_result(None)
                    was_served = True
            self._drop_empty(waiting)
            if was_served and waiting in self._lines:
                self._lines[waiting] = self._lines.pop(waiting)  # the next turn is another line's, if it may have it

    def _drop_empty(self, caller: Caller) -> None:
        if not self._lines[caller]:
            del self._lines[caller]
