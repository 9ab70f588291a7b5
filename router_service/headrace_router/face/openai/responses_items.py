"""What an answer of /v1/responses consists of: thoughts, a message and calls, each an item that events tell of.

An item begins with the first that is said of it. Thoughts end where something else begins; a call at once if it came
whole, else where the next one begins; the one message with the answer. An answer that says nothing is an empty message.
"""

from __future__ import annotations

from typing import Any

from headrace_router.face.openai.said import Said

Event = tuple[str, dict[str, Any]]
"""Its name, and what it says."""
_UNDER_WAY = "in_progress"


class TextItem:
    """A message, or thoughts: an item of one text."""

    def __init__(self, index: int, answer_id: str, *, is_thought: bool) -> None:
        self.status = _UNDER_WAY
        self.texts: list[str] = []
        self._is_thought = is_thought
        self._kind = "reasoning_text" if is_thought else "output_text"
        self._id = f"{'rs' if is_thought else 'msg'}_{answer_id}"
        self._place = {"item_id": self._id, "output_index": index, "content_index": 0}
        self._more: dict[str, Any] = {} if is_thought else {"logprobs": []}

    def item(self) -> dict[str, Any]:
        """Return it as it is now."""
        content = [self._part()] if self.texts or self.status != _UNDER_WAY else []
        if self._is_thought:
            return {"id": self._id, "type": "reasoning", "status": self.status, "summary": [], "content": content}
        return {"id": self._id, "type": "message", "status": self.status, "role": "assistant", "content": content}

    def begin(self) -> list[Event]:
        """Return the events before its text."""
        return [
            ("response.output_item.added", {"output_index": self._place["output_index"], "item": self.item()}),
            ("response.content_part.added", {**self._place, "part": self._part()}),
        ]

    def add(self, text: str) -> Event:
        """Take more of its text, and return the event of it."""
        self.texts.append(text)
        return f"response.{self._kind}.delta", {**self._place, **self._more, "delta": text}

    def end(self, status: str) -> list[Event]:
        """Return the events after its text."""
        self.status = status
        part = self._part()
        return [
            (f"response.{self._kind}.done", {**self._place, "text": part["text"], **self._more}),
            ("response.content_part.done", {**self._place, "part": part}),
            ("response.output_item.done", {"output_index": self._place["output_index"], "item": self.item()}),
        ]

    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = {"type": self._kind, "text": "".join(self.texts)}
        return part if self._is_thought else {**part, "annotations": [], **self._more}


class CallItem:
    """A call of a function."""

    def __init__(self, index: int, call_id: str, name: str) -> None:
        self.status = _UNDER_WAY
        self._id = f"fc_{call_id.removeprefix('call_')}"
        self._call_id, self._name = call_id, name
        self._arguments: list[str] = []
        self._index = index
        self._place = {"item_id": self._id, "output_index": index}

    def item(self) -> dict[str, Any]:
        """Return it as it is now."""
        return {
            "id": self._id,
            "type": "function_call",
            "status": self.status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
        }

    def begin(self) -> list[Event]:
        """Return the event before its arguments."""
        return [("response.output_item.added", {"output_index": self._index, "item": self.item()})]

    def add(self, arguments: str) -> Event:
        """Take more of its arguments, and return the event of it."""
        self._arguments.append(arguments)
        return "response.function_call_arguments.delta", {**self._place, "delta": arguments}

    def end(self, status: str) -> list[Event]:
        """Return the events after its arguments."""
        self.status = status
        item = self.item()
        return [
            ("response.function_call_arguments.done", {**self._place, "arguments": item["arguments"]}),
            ("response.output_item.done", {"output_index": self._index, "item": item}),
        ]


class Output:
    """An answer's items. `say` what each piece says in order, then `end` once."""

    def __init__(self, answer_id: str) -> None:
        self.message: TextItem | None = None
        self._answer_id = answer_id
        self._items: list[TextItem | CallItem] = []
        self._thought: TextItem | None = None
        self._call: CallItem | None = None

    def items(self) -> list[dict[str, Any]]:
        """Return them as they are now, in the order in which they began."""
        return [each.item() for each in self._items]

    def say(self, said: Said) -> list[Event]:
        """Return the events of what a piece says."""
        events: list[Event] = []
        if said.reasoning:
            if self._thought is None:
                self._thought = TextItem(len(self._items), self._answer_id, is_thought=True)
                events += self._begin(self._thought)
            events.append(self._thought.add(said.reasoning))
        if said.content or said.calls:
            events += self._end(self._thought)
        if said.content:
            if self.message is None:
                events += self._begin_message()
            assert self.message is not None
            events.append(self.message.add(said.content))
        for delta in said.calls:
            events += self._add_call(delta)
        return events

    def end(self, status: str) -> list[Event]:
        """Return the last events; items that are under way end with `status`."""
        events = [] if self._items else self._begin_message()
        for item in self._items:
            events += self._end(item, status)
        return events

    def _add_call(self, delta: dict[str, Any]) -> list[Event]:
        function, events = delta["function"], list[Event]()
        if "id" in delta:
            events += self._end(self._call)
            self._call = CallItem(len(self._items), delta["id"], function["name"])
            events += self._begin(self._call)
        assert self._call is not None, "a call begins with its name"
        if function["arguments"]:
            events.append(self._call.add(function["arguments"]))
            if "id" in delta:  # it came whole
                events += self._end(self._call)
        return events

    def _begin_message(self) -> list[Event]:
        self.message = TextItem(len(self._items), self._answer_id, is_thought=False)
        return self._begin(self.message)

    def _begin(self, item: TextItem | CallItem) -> list[Event]:
        self._items.append(item)
        return item.begin()

    def _end(self, item: TextItem | CallItem | None, status: str = "completed") -> list[Event]:
        return [] if item is None or item.status != _UNDER_WAY else item.end(status)
