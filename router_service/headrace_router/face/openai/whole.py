"""An answer in one body."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from headrace.v1 import types_pb2

from headrace_router.face.openai.about import About
from headrace_router.face.openai.parts import (
    CompletionLogprobs,
    Counts,
    JsonLists,
    chat_logprobs,
    finish_word,
    prompt_entries,
)
from headrace_router.face.openai.said import Reader, joined
from headrace_router.requests.piece import Ending, Piece

_PROMPT = "prompt_logprobs"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


@dataclass
class _Choice:
    texts: list[str] = field(default_factory=list[str])
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list[types_pb2.TokenLogprobs])
    ending: Ending | None = None
    texts_logprobs: CompletionLogprobs | None = None
    """Of a completion."""
    said: JsonLists = field(default_factory=JsonLists)
    """`logprobs` of a completion."""
    prompt: JsonLists = field(default_factory=JsonLists)
    """vLLM's `prompt_logprobs`."""


class Whole:
    """Collects one answer: `take` each piece in order, then `body` once."""

    def __init__(self, about: About) -> None:
        self._about = about
        self._choices = [_Choice() for _ in range(about.num_choices)]
        self._counts = Counts(about.num_prompt_tokens, about.num_samples)

    def take(self, piece: Piece) -> None:
        """Take a piece."""
        choice = self._choices[piece.sample_index]
        if piece.is_first or piece.prompt_logprobs is not None:
            self._take_prompt(piece, choice)
        choice.texts.append(piece.text)
        choice.token_ids += piece.token_ids
        choice.logprobs += piece.logprobs
        choice.ending = piece.ending
        self._counts.add(piece.sample_index, len(piece.token_ids), piece.ending)

    def body(self) -> str:
        """Return the answer as JSON."""
        about = self._about
        answer: dict[str, Any] = {
            "id": about.answer_id,
            "object": "chat.completion" if about.wanted.is_chat else "text_completion",
            "created": about.created_s,
            "model": about.model,
        }
        if about.wanted.is_chat and about.wanted.has_token_ids:
            (answer["prompt_token_ids"],) = about.prompts
        parts = [_json(answer)[:-1], f'"usage":{self._counts.usage()}']
        if about.wanted.is_chat and about.wanted.has_prompt_logprobs:
            parts.append(f'"prompt_logprobs":{self._choices[0].prompt.text(_PROMPT)}')
        choices = ",".join(self._choice(index, choice) for index, choice in enumerate(self._choices))
        return ",".join([*parts, f'"choices":[{choices}]}}'])

    def _take_prompt(self, piece: Piece, choice: _Choice) -> None:
        """Take what is said of a prompt's tokens, as JSON at once: it is long, and made of parts that come by turns."""
        about, logprobs = self._about, piece.prompt_logprobs
        prompt = about.prompts[piece.sample_index // about.num_samples]
        if about.wanted.echo and about.wanted.has_logprobs:
            choice.said.add(self._logprobs_of(choice).take_prompt(prompt, logprobs))
        elif about.wanted.has_prompt_logprobs:
            entries = [None] if logprobs is None else prompt_entries(prompt, logprobs, about.token_bytes)
            choice.prompt.add({_PROMPT: entries})

    def _logprobs_of(self, choice: _Choice) -> CompletionLogprobs:
        choice.texts_logprobs = choice.texts_logprobs or CompletionLogprobs(self._about.token_bytes, self._about.hides)
        return choice.texts_logprobs

    def _choice(self, index: int, choice: _Choice) -> str:
        about, text, ending = self._about, "".join(choice.texts), choice.ending
        assert ending is not None, "every sample has ended"
        prompt = index // about.num_samples
        said: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": ending.finish_reason.value}
        if about.make_reader is not None:
            said["message"], has_called = _read(about.make_reader(), text)
            said["finish_reason"] = finish_word(ending.finish_reason, has_called=has_called)
        elif about.wanted.is_chat:
            said["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            said["text"] = about.prompt_texts[prompt] + text
        if about.wanted.has_logprobs and about.wanted.is_chat:
            content = chat_logprobs(choice.token_ids, choice.logprobs, about.token_bytes)
            said["logprobs"] = {"content": content, "refusal": None}
        elif about.wanted.has_logprobs:
            del said["logprobs"]
            choice.said.add(self._logprobs_of(choice).take(choice.token_ids, choice.logprobs))
        if ending.matched_stop_string:
            said["stop_reason"] = ending.matched_stop_string
        if about.wanted.has_token_ids:
            said["token_ids"] = choice.token_ids
            if not about.wanted.is_chat:
                said["prompt_token_ids"] = about.prompts[prompt]
        text = _json(said)
        if about.wanted.is_chat:
            return text
        if about.wanted.has_prompt_logprobs:
            text = f'{text[:-1]},"{_PROMPT}":{choice.prompt.text(_PROMPT)}}}'
        return f'{text[:-1]},"logprobs":{choice.said.object()}}}' if about.wanted.has_logprobs else text


def _read(reader: Reader, text: str) -> tuple[dict[str, Any], bool]:
    """Return the message that a text is, and whether it calls."""
    said = reader.push(text) + reader.finish()
    calls = joined(said.calls)
    message: dict[str, Any] = {"role": "assistant", "content": said.content or (None if calls else ""), "refusal": None}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if calls:
        message["tool_calls"] = calls
    return message, bool(calls)
