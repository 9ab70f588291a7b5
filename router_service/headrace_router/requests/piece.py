"""What a client is told of one sample at a time, whichever way it is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.v1 import generation_service_pb2, types_pb2
from headrace_core.request import FinishReason


@dataclass(slots=True)
class Ending:
    """What is known of a sample when it has ended."""

    finish_reason: FinishReason
    matched_stop_string: str
    """Empty if none matched."""
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    timings: generation_service_pb2.Timings | None
    """If they were asked for."""


@dataclass(slots=True)
class Piece:
    """The next piece of a sample; each token and each character is in one of them. Not mutated."""

    sample_index: int
    text: str
    """May be empty while a character or a possible stop string is incomplete."""
    token_ids: Sequence[int]
    logprobs: Sequence[types_pb2.TokenLogprobs]
    """One for each of `token_ids`, when asked for."""
    is_first: bool
    ending: Ending | None
    """In a sample's last piece."""
    prompt_logprobs: types_pb2.PromptLogprobs | None = None
    """Of prompt tokens behind those of the piece before, when asked for: all of them before the first token, of a part
    of them each piece, which has nothing else."""
