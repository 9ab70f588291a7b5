"""What to ask, by the names that the field uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from headrace_core.errors import InvalidRequestError
from headrace_core.request_trace import Workload

from headrace_client.bench.prompts import Part, Session, Turn


@dataclass(frozen=True, slots=True)
class Preset:
    """Tokens in and out of each request, and how many requests there are unless somebody says."""

    num_input: int
    num_output: int
    num_requests: int = 100


PRESETS = {
    "random": Preset(1024, 128),
    "conversation": Preset(256, 256),
    "conversation-large-batch": Preset(256, 256, 4096),
    "reasoning": Preset(256, 4096),
    "summarization": Preset(4096, 256),
    "shared-prefix": Preset(1024, 128),
    "multi-turn": Preset(256, 128),
}
"""Of `multi-turn` the requests are those of all turns, and the input is what each turn adds."""


class _Kind(IntEnum):
    """The first number of a key, so that no two kinds of parts share tokens."""

    OWN = 0
    PREFIX = 1
    BLOCK = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """How long prompts and answers are. Lengths are drawn evenly from (1 - spread) to (1 + spread) times the mean."""

    num_requests: int
    num_input: int
    num_output: int
    spread: float = 0.0
    seed: int = 0

    def lengths(self) -> list[tuple[int, int]]:
        """Return (input, output) tokens of each request, the same each time."""
        random = np.random.default_rng(self.seed)
        return list(zip(self._draw(self.num_input, random), self._draw(self.num_output, random), strict=True))

    def _draw(self, mean: int, random: np.random.Generator) -> list[int]:
        low, high = max(1, round(mean * (1 - self.spread))), max(1, round(mean * (1 + self.spread)))
        drawn: list[int] = random.integers(low, high + 1, self.num_requests).tolist()
        return drawn


def independent(shape: Shape) -> list[Session]:
    """Return requests no two of which share anything."""
    return [
        Session([Turn([Part((_Kind.OWN, shape.seed, index), num_input)], num_output)])
        for index, (num_input, num_output) in enumerate(shape.lengths())
    ]


def shared_prefix(shape: Shape, *, num_prefixes: int, num_prefix_tokens: int) -> list[Session]:
    """Return requests that begin with one of `num_prefixes` prefixes, in turn; their own tokens come on top."""
    return [
        Session([Turn([Part((_Kind.PREFIX, shape.seed, index % num_prefixes), num_prefix_tokens), *own.parts], out)])
        for index, (own, out) in enumerate((turn, turn.num_output) for turn in _turns(independent(shape)))
    ]


def multi_turn(shape: Shape, *, num_turns: int) -> list[Session]:
    """Return conversations of `num_turns` turns, which add the shape's input each; its requests are all turns."""
    turns = _turns(independent(shape))
    return [Session(turns[start : start + num_turns]) for start in range(0, len(turns), num_turns)]


def from_trace(
    workload: Workload, *, num_requests: int | None, time_scale: float, length_scale: float, seed: int = 0
) -> list[Session]:
    """Return a recorded trace's requests.

    Args:
        workload: blocks with equal ids become equal tokens.
        num_requests: the first so many; None: all.
        time_scale: arrivals come so many times as fast.
        length_scale: prompts, answers and blocks are so many times shorter: what is shared stays shared.
        seed: another one makes other tokens, which share as much.

    Raises:
        InvalidRequestError: BAD_OPTION, a block would be shorter than a token.
    """
    if num_requests is not None:
        workload = workload.head(num_requests)
    block = round(workload.block_tokens / length_scale)
    if block < 1:
        raise InvalidRequestError("BAD_OPTION", f"--length-scale {length_scale:g}: a block is less than a token then")
    sessions: list[Session] = []
    for index in range(len(workload)):
        num_input = max(1, round(int(workload.num_prompt[index]) / length_scale))
        num_output = max(1, round(int(workload.num_output[index]) / length_scale))
        blocks = workload.blocks[index] if workload.blocks is not None else ()
        turn = Turn(_blocks(blocks, block, num_input, (seed, index)), num_output)
        sessions.append(Session([turn], float(workload.arrival_s[index]) / time_scale))
    return sessions


def _blocks(blocks: Sequence[int], block_tokens: int, num_input: int, own: tuple[int, int]) -> list[Part]:
    """Return the parts of a prompt: its blocks as far as it goes, and tokens of its own where it goes further."""
    parts: list[Part] = []
    left = num_input
    for block in blocks:
        if left <= 0:
            break
        parts.append(Part((_Kind.BLOCK, own[0], block), min(left, block_tokens)))
        left -= block_tokens
    if left > 0:
        parts.append(Part((_Kind.OWN, *own), left))
    return parts


def _turns(sessions: Sequence[Session]) -> list[Turn]:
    return [turn for session in sessions for turn in session.turns]
