"""Threads for work whose time grows with its size: what is small never waits for what is large.

Each lane takes sizes up to its border, one at a time: callers in turn (`fair_queue`), each one's own in the order of
arrival. So one caller's hundreds hold up another's by one. What waits is never begun once its deadline has passed or
its caller is gone. What has begun runs to its end, and its lane is taken until then, whether or not anyone still waits
for it: so the memory that all lanes together take is bounded.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from headrace_core.errors import DeadlineError
from headrace_core.shares import Caller

from headrace_router.placement.fair_queue import FairQueue, Turn

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Waiter:
    turn: Turn
    begun: asyncio.Future[None]


class _Lane:
    """Who may work: one at a time. Event loop only."""

    def __init__(self) -> None:
        self._queue: FairQueue[_Waiter] = FairQueue()
        self._arrivals = itertools.count()
        self._is_taken = False

    async def take(self, caller: Caller) -> None:
        """Wait for a turn; `release` must follow."""
        if not self._is_taken:
            self._is_taken = True
            return
        order = (float(next(self._arrivals)), 0)
        turn = Turn((caller.address, caller.name), order, 1.0)  # not by size: time depends on more
        waiter = _Waiter(turn, asyncio.get_running_loop().create_future())
        self._queue.add(waiter)
        try:
            await waiter.begun
        except asyncio.CancelledError:
            if waiter.begun.done() and not waiter.begun.cancelled():
                self.release()
            raise
        finally:
            self._queue.remove(waiter)

    def release(self) -> None:
        """Let the next one begin."""
        for waiter in self._queue:
            if not waiter.begun.done():  # cancelled, and its task has not run yet
                self._queue.serve(waiter)
                waiter.begun.set_result(None)
                return
        self._is_taken = False


class SizeLanes:
    """Event loop only."""

    def __init__(self, name: str, borders: Sequence[int]) -> None:
        """Make one lane for each border, rising, and one for larger sizes; `name` is the threads'."""
        self.num_lanes = len(borders) + 1
        self._borders = list(borders)
        self._turns = [_Lane() for _ in range(self.num_lanes)]
        self._threads = ThreadPoolExecutor(self.num_lanes, thread_name_prefix=name)

    async def run(self, size: int, caller: Caller, deadline_s: float, work: Callable[[int], T]) -> T:
        """Return what `work` returns; it is called on a thread, with the number of its lane.

        Args:
            size: chooses the lane.
            caller: whose work it is.
            deadline_s: by `time.monotonic`.
            work: must end by itself.

        Raises:
            DeadlineError: DEADLINE_EXCEEDED.
        """
        lane = bisect.bisect_left(self._borders, size)
        started_s = time.monotonic()

        def begin() -> T:
            if time.monotonic() >= deadline_s:
                raise TimeoutError
            return work(lane)

        try:
            async with asyncio.timeout(deadline_s - started_s):
                return await self.run_in(lane, caller, begin)
        except TimeoutError:
            waited_s = time.monotonic() - started_s
            raise DeadlineError(
                "DEADLINE_EXCEEDED", f"the prompt did not become tokens in the {waited_s:.3g} s that were left"
            ) from None

    async def run_in(self, lane: int, caller: Caller, work: Callable[[], T]) -> T:
        """Return what `work`, which must end by itself, returns; it is called on a thread, in its turn in `lane`."""
        turn, loop = self._turns[lane], asyncio.get_running_loop()
        await turn.take(caller)
        running = self._threads.submit(work)

        def end(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(turn.release)

        running.add_done_callback(end)
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
