"""Which workers a router called lost though nothing had been done to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LOST = "worker is unreachable"
_SUSPECT = "worker is suspect"
_LATE_S = 5.0
"""How long after a process is back its absence may still be told: a connection that broke meanwhile."""
_SILENCE_S = 9.0
"""A router that is away for so long is given up by its workers (`beats.py`), and then rightly calls them lost."""


@dataclass(frozen=True, slots=True)
class Strike:
    """Something that was done to a process; `address` is where others find it, times are of the wall clock."""

    kind: str
    role: str
    address: str
    begin_s: float
    end_s: float

    def explains(self, address: str, at_s: float) -> bool:
        """Return whether a worker at `address` may be called lost at this time because of it."""
        if self.role == "router":
            is_meant = self.kind == "stop" and self.end_s - self.begin_s > _SILENCE_S
        else:
            is_meant = address == self.address
        return is_meant and self.begin_s <= at_s <= self.end_s + _LATE_S


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What the router said of workers: how often it called one lost, or suspect, and lines of it that nothing explains.

    To suspect one costs nobody anything; to call it lost has its sequences computed again.
    """

    num_lost: int
    num_suspect: int
    num_idly_suspect: int
    false_alarms: list[str]

    @staticmethod
    def of(lines: Iterable[str], strikes: Sequence[Strike]) -> Verdicts:
        """Read a router's log, JSON lines; others are passed over."""
        lost: list[str] = []
        suspect: list[str] = []
        alarms: list[str] = []
        num_idle = 0
        for line in lines:
            if _LOST not in line and _SUSPECT not in line:
                continue
            said = json.loads(line)
            is_explained = any(strike.explains(said["address"], said["time"]) for strike in strikes)
            if said["event"] == _SUSPECT:
                suspect.append(line)
                num_idle += not is_explained
            elif said["event"] == _LOST:
                lost.append(line)
                if not is_explained:
                    alarms.append(f"false alarm: {said['address']}: {said['detail']}")
        return Verdicts(len(lost), len(suspect), num_idle, alarms)
