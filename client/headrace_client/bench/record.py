"""What became of one request, as its client saw it. Seconds, from the beginning of the run, by one clock.

    intended ── waits for a place, or for a late client ──► sent ──► first tokens ── gaps ──► last tokens ──► end

Every latency counts from `intended_s`. In an open loop that is when the request was to be sent, whatever its
predecessors took: a server that stalls makes those wait that were to come meanwhile, and their waiting counts, too
(leaving it out is called coordinated omission). In a closed loop it is when the client had its last answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class Record:
    """One request."""

    index: int
    intended_s: float
    sent_s: float
    deltas: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """When tokens came, and how many together."""
    end_s: float = 0.0
    num_prompt: int = 0
    num_cached: int | None = None
    """Of the prompt's tokens, found in a prefix cache; None where the server does not say."""
    error: str = ""
    """Why it failed; empty if it did not."""
    num_asked: int = 0
    """Tokens asked for; 0: a report of an older version does not say."""

    @property
    def is_ok(self) -> bool:
        """Whether it was answered, to the end."""
        return not self.error and bool(self.deltas)

    @property
    def is_short(self) -> bool:
        """Whether it was answered with fewer tokens than asked for."""
        return self.is_ok and self.num_output < self.num_asked

    @property
    def num_output(self) -> int:
        """Tokens that came."""
        return sum(count for _, count in self.deltas)

    @property
    def ttft_s(self) -> float:
        """To the first tokens."""
        return self.deltas[0][0] - self.intended_s

    @property
    def e2el_s(self) -> float:
        """To the last tokens."""
        return self.deltas[-1][0] - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None if there is no other."""
        num_more = self.num_output - 1
        return (self.deltas[-1][0] - self.deltas[0][0]) / num_more if num_more > 0 else None

    def itls_s(self) -> list[float]:
        """Return the gap before each token after the first delta's; tokens that came together share theirs evenly."""
        return [gap for (last, _), (at, count) in pairwise(self.deltas) for gap in [(at - last) / count] * count]
