"""Threads for work whose time grows with its size: what is small never waits for what is large.

Each lane takes sizes up to its border, in the order of arrival, one at a time. What waits is never begun once its
deadline has passed or its caller is gone. What has begun runs to its end, and its lane is taken until then, whether or
not anyone still waits for it: so the memory that all lanes together take is bounded.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from headrace_core.errors import DeadlineError

T = TypeVar("T")


class SizeLanes:
    """Event loop only."""

    def __init__(self, name: str, borders: Sequence[int]) -> None:
        """Make one lane for each border, rising, and one for larger sizes; `name` is the threads'."""
        self.num_lanes = len(borders) + 1
        self._borders = list(borders)
        self._turns = [asyncio.Lock() for _ in range(self.num_lanes)]
        self._threads = ThreadPoolExecutor(self.num_lanes, thread_name_prefix=name)

    async def run(self, size: int, deadline_s: float, work: Callable[[int], T]) -> T:
        """Return what `work` returns; it is called on a thread, with the number of its lane.

        Args:
            size: chooses the lane.
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
                return await self.run_in(lane, begin)
        except TimeoutError:
            waited_s = time.monotonic() - started_s
            raise DeadlineError(
                "DEADLINE_EXCEEDED", f"the prompt did not become tokens in the {waited_s:.3g} s that were left"
            ) from None

    async def run_in(self, lane: int, work: Callable[[], T]) -> T:
        """Return what `work`, which must end by itself, returns; it is called on a thread, in its turn in `lane`."""
        turn, loop = self._turns[lane], asyncio.get_running_loop()
        await turn.acquire()
        running = self._threads.submit(work)

        def end(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(turn.release)

        running.add_done_callback(end)
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
