"""Calls whose arguments are JSON, in the sections that some models mark: DeepSeek's, Kimi's, Mistral's.

    outside ──begin──► inside ──a head──► arguments, told as they come ──their last brace──► inside
       ▲                  └──end─────────────────────────────────────────────────────────────┘ │
       └───────────────────────────────────────────────────────────────────────────────────────┘

A head names a function and ends where its arguments begin: then the call is told. What stands inside a section and is
neither a call nor what forms put between calls is content. What may still become a mark or a head is held back until it
has, or can't; a head is at most `MOST_HEAD` characters long.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from headrace_router.face.openai.said import Arguments, Outside, Said, begin_call

MOST_HEAD = 1024


@dataclass(frozen=True, slots=True)
class SectionForm:
    """How a model marks calls. `head` has a group `name` or `alone`, and `id` where calls have names of their own.

    `between` is what may stand where no call is, `end` ends a section; empty: the answer's end does, and `begin` is a
    part of heads. `tokens` are those of the marks that may be special ones, besides these two.
    """

    begin: str
    end: str
    head: re.Pattern[str]
    between: re.Pattern[str]
    tokens: tuple[str, ...] = ()

    def reader(self) -> SectionCalls:
        """Return a reader of one choice."""
        return SectionCalls(self)


class SectionCalls:
    """See the module, and `Reader`."""

    def __init__(self, form: SectionForm) -> None:
        self.num_calls = 0
        self._form = form
        self._outside = Outside(form.begin)
        self._is_inside = False
        self._held = ""
        self._arguments: Arguments | None = None

    def push(self, text: str) -> Said:
        """See `Reader`."""
        said = Said()
        while text:
            if self._arguments is not None:
                text = self._arguments.push(text, said)
                if self._arguments.is_over:
                    self._arguments = None
            elif not self._is_inside:
                content, rest = self._outside.push(text)
                said.content += content
                if rest is None:
                    break
                text, self._is_inside = (rest if self._form.end else self._form.begin + rest), True
            else:
                rest = self._inside(self._held + text, said)
                if rest is None:
                    break
                text = rest
        return said

    def finish(self) -> Said:
        """See `Reader`."""
        if not self._is_inside:
            return Said(self._outside.finish())
        held, self._held = self._held, ""
        return Said(self._words(held)) if self._arguments is None else Said()

    def _inside(self, text: str, said: Said) -> str | None:
        """Take what stands where no arguments are; return what is left to be read, None: more must come first."""
        form, looked_at = self._form, text[:MOST_HEAD]
        head = form.head.search(looked_at)
        ended = looked_at.find(form.end) if form.end else -1
        self._held = ""
        if head is not None and not 0 <= ended < head.start():
            said.content += self._words(text[: head.start()])
            groups = head.groupdict()
            call = begin_call(self.num_calls, groups["name"] or groups["alone"])
            said.calls.append(call | {"id": groups["id"]} if groups.get("id") else call)
            self._arguments = Arguments(self.num_calls)
            self.num_calls += 1
            return text[head.end() :]
        if ended >= 0:
            said.content += self._words(text[:ended])
            self._is_inside = False
            self._outside.begin_again()
            return text[ended + len(form.end) :]
        if len(text) >= MOST_HEAD:
            said.content += text[: MOST_HEAD // 2]
            return text[MOST_HEAD // 2 :]
        self._held = text
        return None

    def _words(self, text: str) -> str:
        return "" if self._form.between.fullmatch(text) else text


_ARGUMENTS = r"\s*(?=\{)"


def _deepseek(words: str) -> str:
    return "<\uff5ctool\u2581" + words.replace(" ", "\u2581") + "\uff5c>"


_CALL, _CALL_END, _SEP = map(_deepseek, ("call begin", "call end", "sep"))
DEEPSEEK = SectionForm(
    begin=_deepseek("calls begin"),
    end=_deepseek("calls end"),
    # V3 and R1 say `function`, a name and a fenced block; V3.1 the name alone.
    head=re.compile(rf"{_CALL}\s*(?:function{_SEP}(?P<name>[\w.-]+)\s*```json|(?P<alone>[\w.-]+){_SEP}){_ARGUMENTS}"),
    between=re.compile(rf"\s*(?:```)?\s*(?:{_CALL_END})?\s*"),
    tokens=(_CALL, _CALL_END, _SEP),
)
KIMI = SectionForm(
    begin="<|tool_calls_section_begin|>",
    end="<|tool_calls_section_end|>",
    head=re.compile(
        r"<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[\w-]+)(?::\d+)?)\s*"
        rf"<\|tool_call_argument_begin\|>{_ARGUMENTS}"
    ),
    between=re.compile(r"\s*(?:<\|tool_call_end\|>)?\s*"),
    tokens=("<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>"),
)
MISTRAL = SectionForm(
    begin="[TOOL_CALLS]",
    end="",
    # A list of calls, or each alone behind a mark of its own.
    head=re.compile(
        rf'[\[,]\s*\{{\s*"name"\s*:\s*"(?P<name>[\w.-]+)"\s*,\s*"arguments"\s*:{_ARGUMENTS}'
        rf"|\[TOOL_CALLS\]\s*(?P<alone>[\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?{_ARGUMENTS}"
    ),
    between=re.compile(r'\s*(?:,\s*"id"\s*:\s*"[^"]*"\s*)?\}?\s*\]?\s*(?:\[TOOL_CALLS\])?\s*'),
    tokens=("[ARGS]", "[CALL_ID]"),
)
