"""Do things one after the other in a process of their own: what crashes or hangs costs itself alone, and is named."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

Send = Callable[[Any], None]
Work = Callable[[int, Send], None]

NO_TIME = "not tried: no time was left"
_END_S = 10.0


@dataclass(frozen=True)
class Lost:
    """In place of a result: why there is none."""

    why: str


@dataclass(frozen=True)
class Limits:
    """How long things may take: each of them, seconds, and all, until `clock` shows `ends_at`; None: no end."""

    each_s: float = 60.0
    ends_at: float | None = None
    clock: Callable[[], float] = time.monotonic

    def left_s(self) -> float:
        """Return how long the next thing may take, seconds; 0: no time is left."""
        return self.each_s if self.ends_at is None else max(min(self.each_s, self.ends_at - self.clock()), 0.0)

    @staticmethod
    def begin(each_s: float, seconds: float | None) -> Limits:
        """Return the limits of what begins now and may take `seconds` in all; None: as long as it likes."""
        return Limits(each_s, None if seconds is None else time.monotonic() + seconds)


def in_turn(count: int, work: Work, limits: Limits, preload: Sequence[str] = ()) -> Generator[Any]:
    """Yield a result or `Lost` for each of `count` things, in their order, as soon as it is known.

    `work(first, send)` does the things from number `first` on and sends a result for each; it may return early where
    its process can do no more. It is called in a process forked from one that has imported `preload` and nothing else.
    That is killed when a thing takes too long; what follows gets another, and so does what follows a crash.
    """
    done = 0
    while done < count:
        if not limits.left_s():
            yield from [Lost(NO_TIME)] * (count - done)
            return
        for result in _results(work, range(done, count), limits, preload):
            done += 1
            yield result


def _results(work: Work, rest: range, limits: Limits, preload: Sequence[str]) -> Generator[Any]:
    """Yield what one process finds, at least one result or `Lost`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_begin, args=(work, rest.start, writer), daemon=True)
    process.start()
    writer.close()
    try:
        for number in rest:
            left_s = limits.left_s()
            if not reader.poll(left_s):
                yield Lost(f"cut off after {left_s:.0f} s: it hangs or is slow, in the compiler or in the kernel")
                return
            try:
                yield reader.recv()
            except EOFError:
                process.join(_END_S)
                if number == rest.start:
                    yield Lost(f"its process ended with {process.exitcode}")
                return
    finally:
        process.kill()
        process.join()
        reader.close()


def _begin(work: Work, first: int, writer: Connection) -> None:
    # Ctrl-C reaches this process, too: without a word, since the one that waits for it speaks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    work(first, writer.send)
