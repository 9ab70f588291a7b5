"""How much of a prompt a decode worker had better compute itself than have it handed over. Pure.

Handed over, its first tokens come after the way to a prefill worker and what waits there, and its pages move. Computed
here, they come with a step of the decode worker, which takes so much longer, for every sequence that it runs as well. A
second is a second, whoever waits for it: with n tokens that are not cached here

    hand-off   start + n · (token + transfer)
    here       1½ steps + n · token · (1 + running)

and what is cheaper here are the n up to where the two lines meet.
"""

from __future__ import annotations

from dataclasses import dataclass

_STEPS = 1.5
"""Until a step begins half of one on average, and then it takes one."""


@dataclass(frozen=True, slots=True)
class Costs:
    """As measured last; seconds."""

    start_s: float
    """Of a hand-off, however short the prompt: the way there, and what waits before it."""
    token_s: float
    """A prompt token's, in a step."""
    transfer_s: float
    """A token's, on the way from one worker to the other."""
    step_s: float
    """The decode worker's, with what it runs; 0: it runs nothing."""
    num_running: int
    """Sequences that the decode worker runs."""


def local_below(costs: Costs, most_tokens: int) -> int:
    """Return the most tokens that are cheaper computed at the decode worker, `most_tokens` at most; 0: none are."""
    ahead_s = costs.start_s - _STEPS * costs.step_s
    if ahead_s <= 0:
        return 0
    each_s = costs.token_s * costs.num_running - costs.transfer_s
    return most_tokens if each_s * most_tokens <= ahead_s else int(ahead_s / each_s)
