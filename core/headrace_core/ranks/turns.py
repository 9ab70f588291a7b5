"""Two micro-batches of a step, computed by turns: one goes on while what the other needs of the group travels.

    first    compute | meet . . . . . | compute | meet . . . . . | ...
    second             compute | meet . . . . . | compute | meet . . . . .

Each runs on a thread of its own, and one of the two computes at a time. A micro-batch meets in groups of its own
(`two_batches`), and gives its turn away in each meeting after what it gives was sent; what comes is waited for when it
has its turn again. Turns change there alone, so all ranks compute both in one order, and meet in one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")


class _OtherFailedError(Exception):
    """The other micro-batch failed: this one computes no further."""


class Turns:
    """The turns of two threads, of which the caller of `run` is one. One `run` at a time.

    `least_rows`: of each lane, from which on a decode step is computed so.
    """

    def __init__(self, least_rows: int) -> None:
        self.least_rows = least_rows
        self._thread = threading.local()
        self._second = ThreadPoolExecutor(1, "micro-batch")
        self._changed = threading.Condition()
        self._turn = 0
        self._is_over = [False, False]
        self._failure: BaseException | None = None

    @property
    def number(self) -> int | None:
        """Which of the two the calling thread computes; None: neither."""
        return getattr(self._thread, "number", None)

    def run(self, first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
        """Return what both return, `first` run on this thread and before the other; raise what one raises first."""
        self._turn, self._is_over, self._failure = 0, [False, False], None
        found: dict[int, T] = {}
        other = self._second.submit(copy_context().run, self._run, 1, second, found)
        self._run(0, first, found)
        other.result()
        if self._failure is not None:
            raise self._failure
        return found[0], found[1]

    def give(self) -> None:
        """Let the other compute until it gives the turn back; nothing outside of `run`, or when it is done."""
        number = self.number
        if number is None:
            return
        with self._changed:
            if not self._is_over[1 - number]:
                self._pass_to(1 - number)
                self._changed.wait_for(lambda: self._turn == number)
            if self._failure is not None:
                raise _OtherFailedError

    def close(self) -> None:
        """Let the second thread end."""
        self._second.shutdown(wait=False)

    def _run(self, number: int, compute: Callable[[], T], found: dict[int, T]) -> None:
        self._thread.number = number
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._turn == number)
            if self._failure is None:
                found[number] = compute()
        except BaseException as error:  # noqa: BLE001 - raised by `run`
            self._failure = self._failure or error
        finally:
            self._thread.number = None
            with self._changed:
                self._is_over[number] = True
                self._pass_to(1 - number)

    def _pass_to(self, number: int) -> None:
        self._turn = number
        self._changed.notify_all()
