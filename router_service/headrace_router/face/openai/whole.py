"""An answer in one body."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from headrace.v1 import types_pb2

from headrace_router.face.openai.about import About
from headrace_router.face.openai.parts import CompletionLogprobs, Counts, chat_logprobs, finish_word
from headrace_router.face.openai.said import Reader, joined
from headrace_router.requests.piece import Ending, Piece


@dataclass
class _Choice:
    texts: list[str] = field(default_factory=list[str])
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list[types_pb2.TokenLogprobs])
    ending: Ending | None = None


class Whole:
    """Collects one answer: `take` each piece in order, then `body` once."""

    def __init__(self, about: About) -> None:
        self._about = about
        self._choices = [_Choice() for _ in range(about.num_choices)]
        self._counts = Counts(about.num_prompt_tokens, about.num_samples)

    def take(self, piece: Piece) -> None:
        """Take a piece."""
        choice = self._choices[piece.sample_index]
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
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._choices)],
            "usage": json.loads(self._counts.usage()),
        }
        if about.wanted.is_chat and about.wanted.has_token_ids:
            (answer["prompt_token_ids"],) = about.prompts
        return json.dumps(answer, separators=(",", ":"))

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
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
            said["logprobs"] = CompletionLogprobs(about.token_bytes).take(choice.token_ids, choice.logprobs)
        if ending.matched_stop_string:
            said["stop_reason"] = ending.matched_stop_string
        if about.wanted.has_token_ids:
            said["token_ids"] = choice.token_ids
            if not about.wanted.is_chat:
                said["prompt_token_ids"] = about.prompts[prompt]
        return said


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
