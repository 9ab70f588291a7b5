"""Where one sample's time goes: a waterfall whose parts sum to the whole, by construction.

One clock (the router's), whole microseconds. Each `mark` closes the interval since the previous mark, so there are no
gaps. What a worker reports of an interval is nested in it by subtraction: no part is longer than what is left, and
the remainder has a name of its own. Phases, in the order of an attempt:

    tokenize        arrival to token ids
    queue           in the router's queue
    decode_queue    waiting for pages at the decode worker (reported)
    prefill_queue   in the prefill worker's queue (reported)
    prefill         first step to first token (reported)
    prefill_hop     the rest of the way to the first token, which is the client's now
    transfer        from there until the pages are moved and verified (reported)
    join            the rest until the sequence joined the batch
    first_step      from there to the first token of the decode worker; it holds the prefill where that computes it
    decode          to the last token
    retry           an attempt that failed or was moved: from its last mark, or its last token, to its end

What was moved while the prompt was computed is hidden in `prefill`: it is told beside the phases, and is in no sum. A
retried sample has further `queue`, `prefill`, ... phases after `retry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

PHASES = (
    "tokenize", "queue", "decode_queue", "prefill_queue", "prefill", "prefill_hop", "transfer", "join", "first_step",
    "decode", "retry",
)  # fmt: skip
"""Their names, in the order of an attempt."""


class Phase(NamedTuple):
    """One part of the time."""

    name: str
    duration_us: int
    is_before_first_token: bool


class Waterfall:
    """The phases of one sample. Times are seconds of one monotonic clock."""

    def __init__(self, arrival_s: float) -> None:
        self._start_us = self._last_us = _us(arrival_s)
        self._phases: list[tuple[str, int, bool]] = []
        """As `Phase`; made of it when somebody asks, which few do."""
        self.ttft_us: int | None = None
        self.hidden_us = 0
        """Pages were moved for so long while their prompts were computed; no phase of its own."""

    @property
    def phases(self) -> Sequence[Phase]:
        """What was marked so far, in order."""
        return [Phase(*each) for each in self._phases]

    @property
    def total_us(self) -> int:
        """From arrival to the last mark: the sum of the phases."""
        return self._last_us - self._start_us

    def mark(self, name: str, now_s: float) -> None:
        """Close the interval since the last mark."""
        now_us = max(round(now_s * 1e6), self._last_us)
        self._phases.append((name, now_us - self._last_us, self.ttft_us is None))
        self._last_us = now_us

    def split(self, parts: Sequence[tuple[str, int]], rest: str, now_s: float) -> None:
        """Close the interval since the last mark, reported parts (name, us) first, the remainder as `rest`."""
        now_us = max(_us(now_s), self._last_us)
        left_us = now_us - self._last_us
        for name, reported_us in parts:
            part_us = min(max(reported_us, 0), left_us)
            left_us -= part_us
            self._phases.append((name, part_us, self.ttft_us is None))
        self._phases.append((rest, left_us, self.ttft_us is None))
        self._last_us = now_us

    def hide(self, reported_us: int) -> None:
        """Take note of what was moved meanwhile: no more than there was time for, whatever is reported."""
        self.hidden_us = min(self.hidden_us + reported_us, self.total_us)

    def mark_first_token(self) -> None:
        """Say that the first token came with the last mark; only the first call counts."""
        if self.ttft_us is None:
            self.ttft_us = self.total_us

    def sums_s(self) -> Mapping[str, float]:
        """Return the seconds spent in each phase, over all attempts."""
        sums_us: dict[str, int] = {}
        for name, duration_us, _ in self._phases:
            sums_us[name] = sums_us.get(name, 0) + duration_us
        return {name: sum_us / 1e6 for name, sum_us in sums_us.items()}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
