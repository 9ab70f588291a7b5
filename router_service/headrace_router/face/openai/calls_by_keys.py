"""Calls as GLM's templates have them: a name, then each argument's key and value in tags of their own.

    <tool_call>NAME
    <arg_key>KEY</arg_key>
    <arg_value>VALUE</arg_value>
    ...
    </tool_call>

A value is JSON, but a text as it is. Of one that the function's parameters say is a text nothing else is made; of any
other whatever JSON reads. A call is told with its name, then argument by argument, as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from headrace_router.face.openai.said import Outside, Said, begin_call

BEGIN, END = "<tool_call>", "</tool_call>"
TOKENS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
MOST_NAME = 256
_NAME = re.compile(rf"\s*([\w.-]+)\s*(?=<arg_key>|{END})")
_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)

Texts = Mapping[str, frozenset[str]]
"""Of each function the parameters that are texts."""


class KeyedCalls:
    """See the module, and `Reader`."""

    def __init__(self, texts: Texts) -> None:
        self.num_calls = 0
        self._texts = texts
        self._outside = Outside(BEGIN)
        self._is_inside = False
        self._name = ""
        self._num_arguments = 0
        self._held = ""

    def push(self, text: str) -> Said:
        """See `Reader`."""
        said = Said()
        while True:
            if self._is_inside:
                rest = self._inside(self._held + text, said)
            else:
                content, rest = self._outside.push(text)
                said.content += content
                self._is_inside, self._name, self._held = rest is not None, "", ""
            if rest is None:
                return said
            text = rest

    def finish(self) -> Said:
        """See `Reader`."""
        held, self._held = self._held, ""
        if not self._is_inside:
            return Said(self._outside.finish())
        # Of a call that was told nothing more is certain; what is none is what the answer says.
        return Said() if self._name else Said(BEGIN + held)

    def _inside(self, text: str, said: Said) -> str | None:
        """Take the next part of a call; return what is left to be read, None: more must come first."""
        self._held = ""
        if not self._name:
            return self._begin(text, said)
        found = _ARGUMENT.match(text)
        end = text.find(END)
        if found is not None:
            self._argument(found[1].strip(), found[2], said)
            return text[found.end() :]
        if end >= 0 and "<arg_key>" not in text[:end]:
            self._tell("}" if self._num_arguments else "{}", said)
            self._is_inside = False
            self._outside.begin_again()
            return text[end + len(END) :]
        self._held = text
        return None

    def _begin(self, text: str, said: Said) -> str | None:
        found = _NAME.match(text[:MOST_NAME])
        if found is not None:
            said.calls.append(begin_call(self.num_calls, found[1]))
            self._name, self._num_arguments = found[1], 0
            self.num_calls += 1
            return text[found.end() :]
        end = text.find(END)
        if end >= 0 or len(text) >= MOST_NAME:  # it is no call
            end = end + len(END) if end >= 0 else MOST_NAME
            said.content += BEGIN + text[:end]
            self._is_inside = False
            return text[end:]
        self._held = text
        return None

    def _argument(self, key: str, value: str, said: Said) -> None:
        self._num_arguments += 1
        said_so: object = value
        if key not in self._texts.get(self._name, ()):
            try:
                said_so = json.loads(value)
            except (ValueError, RecursionError):
                said_so = value
        pair = f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(said_so, ensure_ascii=False)}"
        self._tell(("{" if self._num_arguments == 1 else ", ") + pair, said)

    def _tell(self, arguments: str, said: Said) -> None:
        said.calls.append({"index": self.num_calls - 1, "function": {"arguments": arguments}})
