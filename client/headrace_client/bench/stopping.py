"""Ctrl-C, or SIGTERM, while a run is under way: it stops, and what was answered until then is not lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class Stop:
    """Which signal came, if one did."""

    by: signal.Signals | None = None


@contextmanager
def stopping(stop: Callable[[], None], told: Stop) -> Generator[None]:
    """Call `stop` when a signal comes, once: a second one ends the process as if there were no run.

    Main thread only; the loop's handlers are gone after the block.
    """
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        told.by = number
        forget()
        stop()

    def forget() -> None:
        for number in handled:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])
        handled.clear()

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    handled = [number for number in _SIGNALS if before[number] is not signal.SIG_IGN]
    for number in handled:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        forget()
