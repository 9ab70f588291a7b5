"""Calls that may never return: a resolver that does not answer, a file on a disk that is gone.

An executor has few threads, which such calls take from all others, and a process that ends waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def call_outside(function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
    """Call `function` on a daemon thread of its own; return what becomes of it. Event loop only.

    Who gives up cancels the future; the thread ends when the call does.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[], None]) -> None:
        if not outcome.done():
            set_outcome()
            outcome.exception()  # seen: who gave up does not ask for it

    def run() -> None:
        try:
            result = function(*arguments)
        except Exception as error:  # noqa: BLE001 - the boundary: it is raised where it is waited for
            end = _bound(outcome.set_exception, error)
        else:
            end = _bound(outcome.set_result, result)
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(settle, end)

    threading.Thread(target=run, name=f"outside-{function.__name__}", daemon=True).start()
    return outcome


def _bound(function: Callable[[T], None], argument: T) -> Callable[[], None]:
    return lambda: function(argument)
