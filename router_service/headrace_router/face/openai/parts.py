"""Parts that streamed and whole answers share, as JSON's values or its text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring_ascii  # pyright: ignore[reportUnknownVariableType] - json's own, in C
from typing import Any

from headrace.v1 import types_pb2
from headrace_core.request import FinishReason

from headrace_router.requests.piece import Ending

quoted: Callable[[str], str] = encode_basestring_ascii  # pyright: ignore[reportAssignmentType]
"""A text as JSON, in ASCII."""

TokenBytes = Callable[[int], bytes]
"""What a token stands for."""

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has not; OpenAI's own."""


class Counts:
    """Of an answer's tokens, so far."""

    def __init__(self, num_prompt: int, num_samples: int) -> None:
        """Args: `num_prompt` tokens of all prompts; `num_samples` of each of them."""
        self.num_prompt = num_prompt
        self._num_samples = num_samples
        self.num_output = 0
        self.num_cached = 0

    def add(self, sample_index: int, num_new: int, ending: Ending | None) -> None:
        """Take note of a piece."""
        self.num_output += num_new
        if ending is not None and sample_index % self._num_samples == 0:  # a prompt counts once
            self.num_cached += ending.num_cached_tokens

    def usage(self) -> str:
        """Return OpenAI's `usage` as JSON."""
        return (
            f'{{"prompt_tokens":{self.num_prompt},"completion_tokens":{self.num_output},'
            f'"total_tokens":{self.num_prompt + self.num_output},'
            f'"prompt_tokens_details":{{"cached_tokens":{self.num_cached}}}}}'
        )


def finish_word(reason: FinishReason, *, has_called: bool) -> str:
    """Return OpenAI's word for how a choice ended."""
    return "tool_calls" if has_called and reason is FinishReason.STOP else reason.value


def chat_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[types_pb2.TokenLogprobs], token_bytes: TokenBytes
) -> list[dict[str, Any]]:
    """Return the entries of `logprobs.content`."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        content = token_bytes(token_id)
        text = content.decode("utf-8", "replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(content)}

    return [
        {**entry(token_id, each.logprob), "top_logprobs": [entry(top.token_id, top.logprob) for top in each.top]}
        for token_id, each in zip(token_ids, logprobs, strict=True)
    ]


class CompletionLogprobs:
    """The `logprobs` of one choice of /v1/completions, whose offsets go on from piece to piece."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._offset = 0

    def take(self, token_ids: Sequence[int], logprobs: Sequence[types_pb2.TokenLogprobs]) -> dict[str, list[Any]]:
        """Return what is said of new tokens."""
        said: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, each in zip(token_ids, logprobs, strict=True):
            text, logprob = self._text(token_id), _finite(each.logprob)
            said["tokens"].append(text)
            said["token_logprobs"].append(logprob)
            said["top_logprobs"].append(
                {text: logprob} | {self._text(top.token_id): _finite(top.logprob) for top in each.top}
            )
            said["text_offset"].append(self._offset)
            self._offset += len(text)
        return said

    def _text(self, token_id: int) -> str:
        return self._token_bytes(token_id).decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return max(_LEAST_LOGPROB, logprob) if not math.isnan(logprob) else _LEAST_LOGPROB
