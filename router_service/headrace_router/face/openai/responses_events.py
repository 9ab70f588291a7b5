"""Answers of `/v1/responses`, in one body or in events that each have a name.

response.created · response.in_progress · response.output_item.added · response.content_part.added
response.output_text.delta …
response.output_text.done · response.content_part.done · response.output_item.done
response.completed, or response.incomplete where `max_output_tokens` ended it
"""

from __future__ import annotations

import json
from typing import Any

from headrace_core.request import FinishReason

from headrace_router.face.openai.about import About
from headrace_router.face.openai.parts import quoted
from headrace_router.requests.piece import Ending, Piece


class _Response:
    """What both ways of answering tell."""

    def __init__(self, about: About) -> None:
        self._about = about
        self._item_id = f"msg_{about.answer_id}"
        self._texts: list[str] = []
        self._num_tokens = 0
        self._ending: Ending | None = None

    def add(self, piece: Piece) -> None:
        """Take a piece."""
        self._texts.append(piece.text)
        self._num_tokens += len(piece.token_ids)
        self._ending = piece.ending

    @property
    def status(self) -> str:
        """How far it is."""
        if self._ending is None:
            return "in_progress"
        return "completed" if self._ending.finish_reason is FinishReason.STOP else "incomplete"

    def part(self) -> dict[str, Any]:
        """Return the one part of the one item."""
        return {"type": "output_text", "text": "".join(self._texts), "annotations": [], "logprobs": []}

    def item(self) -> dict[str, Any]:
        """Return the one item."""
        content = [self.part()] if self._texts or self._ending else []
        return {
            "id": self._item_id, "type": "message", "status": self.status, "role": "assistant", "content": content,
        }  # fmt: skip

    def response(self) -> dict[str, Any]:
        """Return the whole object."""
        about, ending, is_over = self._about, self._ending, self._ending is not None
        usage = None
        if ending is not None:
            usage = {
                "input_tokens": about.num_prompt_tokens,
                "input_tokens_details": {"cached_tokens": ending.num_cached_tokens},
                "output_tokens": self._num_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
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
            "output": [self.item()] if is_over else [],
            **about.wanted.said,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "usage": usage,
        }


class WholeResponse:
    """Collects one answer: `take` each piece in order, then `body` once."""

    def __init__(self, about: About) -> None:
        self._response = _Response(about)

    def take(self, piece: Piece) -> None:
        """Take a piece."""
        self._response.add(piece)

    def body(self) -> str:
        """Return the answer as JSON."""
        return json.dumps(self._response.response(), separators=(",", ":"))


class ResponseEvents:
    """One answer's events: `take` each piece in order, then `last` once."""

    def __init__(self, about: About) -> None:
        self._response = _Response(about)
        self._number = 0
        item_id = f"msg_{about.answer_id}"
        self._place: dict[str, Any] = {"item_id": item_id, "output_index": 0, "content_index": 0}
        self._delta = (
            "event: response.output_text.delta\ndata: "
            f'{{"type":"response.output_text.delta","item_id":{quoted(item_id)},"output_index":0,'
            '"content_index":0,"logprobs":[],"delta":'
        )

    def take(self, piece: Piece) -> str:
        """Return the events of a piece; empty if it has none."""
        events = self._begin() if piece.is_first else ""
        self._response.add(piece)
        if piece.text:
            events += f'{self._delta}{quoted(piece.text)},"sequence_number":{self._number}}}\n\n'
            self._number += 1
        return events

    def last(self) -> str:
        """Return the events after the last piece."""
        response, part = self._response, self._response.part()
        end = "response.completed" if response.status == "completed" else "response.incomplete"
        return "".join(
            (
                self._event("response.output_text.done", **self._place, text=part["text"], logprobs=[]),
                self._event("response.content_part.done", **self._place, part=part),
                self._event("response.output_item.done", output_index=0, item=response.item()),
                self._event(end, response=response.response()),
            )
        )

    def _begin(self) -> str:
        response = self._response
        item = response.item()
        return "".join(
            (
                self._event("response.created", response=response.response()),
                self._event("response.in_progress", response=response.response()),
                self._event("response.output_item.added", output_index=0, item=item),
                self._event("response.content_part.added", **self._place, part=response.part()),
            )
        )

    def _event(self, name: str, **fields: Any) -> str:
        said = {"type": name, **fields, "sequence_number": self._number}
        self._number += 1
        return f"event: {name}\ndata: {json.dumps(said, separators=(',', ':'))}\n\n"
