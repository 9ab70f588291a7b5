"""Parts that streamed and whole answers share, as JSON's values or its text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def places_of(
    logprobs: types_pb2.PromptLogprobs,
) -> Iterator[tuple[int, float, int, list[tuple[int, float]]]]:
    """Yield of each token its position, its log-probability and rank, and the most probable ones in its place."""
    num_top = len(logprobs.top_token_ids) // len(logprobs.logprobs)
    tops = list(zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True))
    for index, (logprob, rank) in enumerate(zip(logprobs.logprobs, logprobs.ranks, strict=True)):
        yield logprobs.first_position + index, logprob, rank, tops[index * num_top : (index + 1) * num_top]


def prompt_entries(
    prompt_ids: Sequence[int], logprobs: types_pb2.PromptLogprobs, token_bytes: TokenBytes
) -> list[dict[str, Any] | None]:
    """Return entries of vLLM's `prompt_logprobs`, of its first token None."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = token_bytes(token_id).decode("utf-8", "replace")
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": text}

    said: list[dict[str, Any] | None] = [None] if logprobs.first_position == 1 else []
    for place, logprob, rank, tops in places_of(logprobs):
        others = {str(top): entry(top, value, index) for index, (top, value) in enumerate(tops, start=1)}
        own = prompt_ids[place]
        said.append({str(own): entry(own, logprob, rank)} | others)
    return said


class CompletionLogprobs:
    """The `logprobs` of one choice of /v1/completions, whose offsets go on from piece to piece."""

    def __init__(self, token_bytes: TokenBytes, hides: Callable[[str], bool]) -> None:
        """Args: `hides` says whether this is a special token, which has no place in the choice's text."""
        self._token_bytes = token_bytes
        self._hides = hides
        self._offset = 0
        self._said = _nothing_said()

    def take(self, token_ids: Sequence[int], logprobs: Sequence[types_pb2.TokenLogprobs]) -> dict[str, list[Any]]:
        """Return what is said of new tokens."""
        for token_id, each in zip(token_ids, logprobs, strict=True):
            self._add(token_id, each.logprob, [(top.token_id, top.logprob) for top in each.top])
        return self._taken()

    def take_prompt(self, prompt_ids: Sequence[int], logprobs: types_pb2.PromptLogprobs | None) -> dict[str, list[Any]]:
        """Return what is said of tokens of a prompt; of its first one that nothing is. None: it has no other."""
        if logprobs is None or logprobs.first_position == 1:
            self._add(prompt_ids[0], None, None)
        for place, logprob, _, tops in places_of(logprobs) if logprobs is not None else ():
            self._add(prompt_ids[place], logprob, tops)
        return self._taken()

    def _add(self, token_id: int, logprob: float | None, tops: Iterable[tuple[int, float]] | None) -> None:
        said, text = self._said, self._text(token_id)
        own = None if logprob is None else _finite(logprob)
        said["tokens"].append(text)
        said["token_logprobs"].append(own)
        said["top_logprobs"].append(
            None if tops is None else {text: own} | {self._text(top): _finite(value) for top, value in tops}
        )
        said["text_offset"].append(self._offset)
        self._offset += 0 if self._hides(text) else len(text)

    def _taken(self) -> dict[str, list[Any]]:
        said, self._said = self._said, _nothing_said()
        return said

    def _text(self, token_id: int) -> str:
        return self._token_bytes(token_id).decode("utf-8", "replace")


def _nothing_said() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class JsonLists:
    """Lists by name, of which only the JSON is kept: made when a part comes, joined at the end."""

    def __init__(self) -> None:
        self._parts: dict[str, list[str]] = {}

    def add(self, said: Mapping[str, Sequence[Any]]) -> None:
        """Append to each."""
        for name, values in said.items():
            parts = self._parts.setdefault(name, [])
            if values:
                parts.append(json.dumps(values, separators=(",", ":"))[1:-1])

    def text(self, name: str) -> str:
        """Return one of them as JSON."""
        return f"[{','.join(self._parts.get(name, ()))}]"

    def object(self) -> str:
        """Return all of them as JSON."""
        return "{" + ",".join(f"{quoted(name)}:{self.text(name)}" for name in self._parts) + "}"


def _finite(logprob: float) -> float:
    return max(_LEAST_LOGPROB, logprob) if not math.isnan(logprob) else _LEAST_LOGPROB
