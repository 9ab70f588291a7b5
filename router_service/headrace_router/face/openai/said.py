"""What a conversation's answer says besides its text: what the model thought, and what it calls.

A reader takes an answer's text piece by piece and returns what each piece adds. `Thinking` cuts off what stands between
`<think>` and `</think>`, `TaggedCalls` what `<tool_call>` marks, `ForcedCalls` reads the one form that a grammar forces
(`tools.py`). What may still become a mark is held back until it has, or can't.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

_FORCED_HEAD = re.compile(r'[\[,]\{"name":"([A-Za-z0-9_-]+)","arguments":')


@dataclass(slots=True)
class Said:
    """What a piece adds; `calls` as OpenAI's deltas of `tool_calls`."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def __add__(self, other: Said) -> Said:
        """Return both."""
        return Said(self.content + other.content, self.reasoning + other.reasoning, self.calls + other.calls)

    def __bool__(self) -> bool:
        """Return whether it is anything."""
        return bool(self.content or self.reasoning or self.calls)


class Reader(Protocol):
    """Of one choice. `push` each piece's text in order, then `finish` once."""

    @property
    def num_calls(self) -> int:
        """Calls so far."""
        ...

    def push(self, text: str) -> Said:
        """Return what a piece adds."""
        ...

    def finish(self) -> Said:
        """Return what was held back."""
        ...


MakeReader = Callable[[], Reader]


class Plain:
    """All is content."""

    num_calls = 0

    def push(self, text: str) -> Said:
        """See `Reader`."""
        return Said(text)

    def finish(self) -> Said:
        """See `Reader`."""
        return Said()


def _split(text: str, mark: str) -> tuple[str, str, bool]:
    """Return what certainly stands before the mark, the rest, and whether the mark was found between them.

    A rest without it may be the mark's beginning.
    """
    before, found, after = text.partition(mark)
    if found:
        return before, after, True
    num_held = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
    return text[: len(text) - num_held], text[len(text) - num_held :], False


class Thinking:
    """Reasoning, then what `inner` makes of the rest. New lines beside the marks are nobody's words."""

    BEGIN, END = "<think>", "</think>"

    def __init__(self, inner: Reader, *, has_begun: bool) -> None:
        """Args: `has_begun`, by what the template wrote."""
        self._inner = inner
        self._held = ""
        self._push: Callable[[], Said] = self._thinking if has_begun else self._beginning
        self._is_fresh = True
        """No word has come since the last mark."""

    @property
    def num_calls(self) -> int:
        """See `Reader`."""
        return self._inner.num_calls

    def push(self, text: str) -> Said:
        """See `Reader`."""
        self._held += text
        return self._push()

    def finish(self) -> Said:
        """See `Reader`."""
        held, self._held = self._held, ""
        said = Said(reasoning=held) if self._push == self._thinking else self._inner.push(held)
        return said + self._inner.finish()

    def _beginning(self) -> Said:
        start = self._held.lstrip()
        if start.startswith(self.BEGIN):
            self._held, self._push = start[len(self.BEGIN) :], self._thinking
        elif self.BEGIN.startswith(start):
            return Said()
        else:
            self._push, self._is_fresh = self._answering, False
        return self._push()

    def _thinking(self) -> Said:
        thought, self._held, is_over = _split(self._held, self.END)
        if not is_over:  # new lines at the end may stand before the mark
            kept = thought.rstrip("\n")
            thought, self._held = kept, thought[len(kept) :] + self._held
            return Said(reasoning=self._fresh(thought))
        said = Said(reasoning=self._fresh(thought.rstrip("\n")))
        self._push, self._is_fresh = self._answering, True
        return said + self._push()

    def _answering(self) -> Said:
        text, self._held = self._fresh(self._held), ""
        return self._inner.push(text) if text else Said()

    def _fresh(self, text: str) -> str:
        if self._is_fresh:
            text = text.lstrip("\n")
            self._is_fresh = not text
        return text


class Outside:
    """What stands before a mark, again and again. New lines beside the mark, and behind what it began, are nobody's."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._held = ""
        self._is_fresh = False
        """No word has come since what the last mark began was over."""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return what certainly stands before the mark, and what comes behind it; None: it has not come."""
        held = self._held + text
        content, rest, is_found = _split(held.lstrip("\n") if self._is_fresh else held, self._mark)
        shown = content.rstrip("\n")  # new lines at the end may stand before a mark
        self._is_fresh = self._is_fresh and not shown
        self._held = "" if is_found else content[len(shown) :] + rest
        return shown, rest if is_found else None

    def begin_again(self) -> None:
        """What a mark began is over."""
        self._is_fresh = True

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


class TaggedCalls:
    """Calls as Hermes' and Qwen's templates have them, `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

    A call is told when it is whole. What stands between the tags and is none is content, tags and all.
    """

    BEGIN, END = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""
        self._is_inside = False
        self._outside = Outside(self.BEGIN)

    def push(self, text: str) -> Said:
        """See `Reader`."""
        said = Said()
        while True:
            if self._is_inside:
                body, found, after = (self._held + text).partition(self.END)
                if not found:
                    self._held = body
                    return said
                self._held, text, self._is_inside = "", after, False
                self._outside.begin_again()
                said += self._call(body)
            else:
                content, rest = self._outside.push(text)
                said.content += content
                if rest is None:
                    return said
                text, self._is_inside = rest, True

    def finish(self) -> Said:
        """See `Reader`."""
        held, self._held = self._held, ""
        if not self._is_inside:
            return Said(self._outside.finish())
        said = self._call(held)  # a stop string may have taken the end's mark
        return said if said.calls else Said(self.BEGIN + held)

    def _call(self, body: str) -> Said:
        try:
            value: object = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        fields = cast("dict[str, object]", value) if isinstance(value, dict) else {}
        name, arguments = fields.get("name"), fields.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return Said(self.BEGIN + body + self.END)
        call = begin_call(self.num_calls, name)
        call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
        self.num_calls += 1
        return Said(calls=[call])


class ForcedCalls:
    """Calls as a grammar has them (`tools.py`), told as they come."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""
        """Of what is between calls."""
        self._arguments: Arguments | None = None

    def push(self, text: str) -> Said:
        """See `Reader`."""
        said = Said()
        while text:
            if self._arguments is not None:
                text = self._arguments.push(text, said)
                if self._arguments.is_over:
                    self._arguments = None
                continue
            self._held += text
            head = _FORCED_HEAD.search(self._held)
            if head is None:
                break
            text, self._held, self._arguments = self._held[head.end() :], "", Arguments(self.num_calls)
            said.calls.append(begin_call(self.num_calls, head[1]))
            self.num_calls += 1
        return said

    def finish(self) -> Said:
        """See `Reader`."""
        return Said()


class Arguments:
    """Of one call: an object or a list that comes in pieces, and ends where it is closed."""

    def __init__(self, index: int) -> None:
        self.is_over = False
        self._index = index
        self._depth = 0
        self._is_text = self._is_escaped = False

    def push(self, text: str, said: Said) -> str:
        """Say what of `text`, which is not empty, still belongs to them; return the rest."""
        count = self._count(text)
        said.calls.append({"index": self._index, "function": {"arguments": text[:count]}})
        return text[count:]

    def _count(self, text: str) -> int:
        for at, char in enumerate(text):
            if self._is_text:
                self._is_text = self._is_escaped or char != '"'
                self._is_escaped = char == "\\" and not self._is_escaped
            elif char == '"':
                self._is_text = True
            elif char in "{[":
                self._depth += 1
            elif char in "]}":
                self._depth -= 1
                if not self._depth:
                    self.is_over = True
                    return at + 1
        return len(text)


def begin_call(index: int, name: str) -> dict[str, Any]:
    """Return the first delta of a call."""
    return {
        "index": index,
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": ""},
    }


def joined(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return whole calls of their deltas."""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if "id" in delta:
            calls.append({name: value for name, value in delta.items() if name != "index"})
            calls[-1]["function"] = dict(delta["function"])
        else:
            calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
    return calls
