"""Answers of `/v1/responses`, in one body or in events that each have a name.

response.created · response.in_progress
of thoughts and of the message: response.output_item.added · response.content_part.added
    response.reasoning_text.delta, or response.output_text.delta …
    response.reasoning_text.done, or response.output_text.done · response.content_part.done · response.output_item.done
of a call: response.output_item.added · response.function_call_arguments.delta …
    response.function_call_arguments.done · response.output_item.done
response.completed, or response.incomplete where `max_output_tokens` ended it
"""

from __future__ import annotations

import json
from typing import Any

from headrace_core.request import FinishReason

from headrace_router.face.openai.about import About
from headrace_router.face.openai.parts import quoted
from headrace_router.face.openai.responses_items import Event, Output
from headrace_router.face.openai.said import Said
from headrace_router.requests.piece import Ending, Piece


class _Response:
    """What both ways of answering tell."""

    def __init__(self, about: About) -> None:
        self.output = Output(about.answer_id)
        self.reader = about.make_reader() if about.make_reader is not None else None
        self._about = about
        self._num_tokens = 0
        self._num_thought = 0
        """Tokens up to the last that brought a thought."""
        self._ending: Ending | None = None

    def take(self, piece: Piece) -> list[Event]:
        """Take a piece, and return its events."""
        self.count(piece)
        if self.reader is None:
            return self.output.say(Said(piece.text))
        said = self.reader.push(piece.text)
        if piece.ending is not None:
            said += self.reader.finish()
        if said.reasoning:
            self._num_thought = self._num_tokens
        return self.output.say(said)

    def count(self, piece: Piece) -> None:
        """Take note of a piece, but not of what it says."""
        self._num_tokens += len(piece.token_ids)
        self._ending = piece.ending

    @property
    def status(self) -> str:
        """How far it is."""
        if self._ending is None:
            return "in_progress"
        return "completed" if self._ending.finish_reason is FinishReason.STOP else "incomplete"

    def response(self) -> dict[str, Any]:
        """Return the whole object."""
        about, ending, is_over = self._about, self._ending, self._ending is not None
        usage = None
        if ending is not None:
            usage = {
                "input_tokens": about.num_prompt_tokens,
                "input_tokens_details": {"cached_tokens": ending.num_cached_tokens},
                "output_tokens": self._num_tokens,
                "output_tokens_details": {"reasoning_tokens": self._num_thought},
                "total_tokens": about.num_prompt_tokens + self._num_tokens,
            }
        return {
            "id": about.answer_id,
            "object": "response",
            "created_at": about.created_s,
            "status": self.status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "model": about.model,
            "output": self.output.items() if is_over else [],
            **about.wanted.said,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": usage,
        }


class WholeResponse:
    """Collects one answer: `take` each piece in order, then `body` once."""

    def __init__(self, about: About) -> None:
        self._response = _Response(about)

    def take(self, piece: Piece) -> None:
        """Take a piece."""
        self._response.take(piece)

    def body(self) -> str:
        """Return the answer as JSON."""
        self._response.output.end(self._response.status)
        return json.dumps(self._response.response(), separators=(",", ":"))


class ResponseEvents:
    """One answer's events: `take` each piece in order, then `last` once."""

    def __init__(self, about: About) -> None:
        self._response = _Response(about)
        self._number = 0
        self._delta = (
            "event: response.output_text.delta\ndata: "
            f'{{"type":"response.output_text.delta","item_id":{quoted(f"msg_{about.answer_id}")},"output_index":0,'
            '"content_index":0,"logprobs":[],"delta":'
        )
        """Of the message, where there is nothing else."""

    def take(self, piece: Piece) -> str:
        """Return the events of a piece; empty if it has none."""
        response = self._response
        message = response.output.message
        if message is not None and response.reader is None:  # as of most tokens
            response.count(piece)
            if not piece.text:
                return ""
            message.texts.append(piece.text)
            self._number += 1
            return f'{self._delta}{quoted(piece.text)},"sequence_number":{self._number - 1}}}\n\n'
        begun = {"response": response.response()} if piece.is_first else {}
        names = ("response.created", "response.in_progress") if begun else ()
        return self._told([*((name, begun) for name in names), *response.take(piece)])

    def last(self) -> str:
        """Return the events after the last piece."""
        response = self._response
        events = response.output.end(response.status)
        end = "response.completed" if response.status == "completed" else "response.incomplete"
        return self._told([*events, (end, {"response": response.response()})])

    def _told(self, events: list[Event]) -> str:
        told: list[str] = []
        for name, fields in events:
            said = {"type": name, **fields, "sequence_number": self._number}
            self._number += 1
            told.append(f"event: {name}\ndata: {json.dumps(said, separators=(',', ':'))}\n\n")
        return "".join(told)
