"""Where a step's time goes: the network marks where one operation ends and the next begins.

A mark gives all the time since the mark before it to the operation it names, so an operation's times add up to the
step's with nothing left over. Names are those of `headrace_core.roofline.operations`; what one kernel computes at once
is named after all of its parts, joined by "+". Three names are beyond the roofline: `SAMPLING`, `MTP` for the module
that guesses tokens, and `OTHER` for what prepares a step.

On a CPU a call returns when its work is done. On a GPU it does not: these marks would measure launches, so nobody
may measure there.
"""

from __future__ import annotations

import time
from collections import defaultdict

SAMPLING = "sampling"
OTHER = "other"
MTP = "mtp"


class OpTimer:
    """Measures nothing; a mark costs one call of an empty function."""

    __slots__ = ()

    def mark(self, op: str) -> None:
        """Say that what was computed since the last mark was `op`."""


class RunningOpTimer(OpTimer):
    """Measures from when it is made. One step, engine thread only. `seconds` by operation."""

    __slots__ = ("_last_s", "seconds")

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last_s = time.perf_counter()

    def mark(self, op: str) -> None:
        """See `OpTimer`."""
        now_s = time.perf_counter()
        self.seconds[op] += now_s - self._last_s
        self._last_s = now_s


OFF = OpTimer()
"""For steps that are not measured: almost all."""
