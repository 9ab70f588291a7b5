"""What a signal does to a process that has nothing to put away: while it imports, and at its very end.

Loading torch or grpc takes a second in which Python would answer SIGINT with a traceback, and as the first process of
a container ignore SIGTERM. Imports next to nothing: whoever uses it does so before everything else.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes of what a signal ended, as shells have them."""


def exit_on(*numbers: signal.Signals, code: int) -> None:
    """Let each of these signals end this process at once, in silence, with `code`; one that is ignored stays so."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        del number, frame
        os._exit(code)

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


@contextmanager
def interruptible() -> Generator[None]:
    """Let SIGINT and SIGTERM raise inside, so that what is under way is put away, and do what they did after it.

    SIGINT raises `KeyboardInterrupt`, SIGTERM `SystemExit(143)`; one that is ignored stays so. Main thread only.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        del number, frame
        raise SystemExit(TERMINATED)

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: leave}
    before = {number: signal.getsignal(number) for number in handlers}
    changed = {number for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in changed:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])
