"""A model's chat templates: what they may use, and how a conversation becomes text.

Templates are written for transformers, so they find here what `apply_chat_template` gives them (transformers 5.23,
utils/chat_template_utils.py): loop controls, `tojson` with its four options, `raise_exception`, `strftime_now`, and
`{% generation %}`, which marks the assistant's words for training and renders its body. A message that is gone on from
is found in the text as transformers finds it, by a mark behind its own.

The sandbox keeps a template from Python's internals, not from time or memory: it is compiled and rendered only in the
process of `chat_process.py`. Compiling counts: jinja computes constants, `2 ** 10 ** 9` too, when it compiles.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn, cast

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace_router.text.chat_protocol import Conversation, TemplateSource
from headrace_router.text.control_text import PLAIN_ROLES, PlainText

_CONTINUED_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that a message's reasoning has in templates and clients."""
_OWN = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})
"""Variables that a request says otherwise."""
_MAX_SHOWN = 80


class ChatTemplate:
    """A model's templates, compiled. Compile and render where time and memory are bounded."""

    def __init__(self, source: TemplateSource) -> None:
        """Compile the one that is called `default`; others when they are used.

        Raises:
            Exception: any that jinja or a constant expression of the template raises.
        """
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._environment.globals.update(functions)
        self._environment.filters["tojson"] = _to_json
        self._source = source
        self._plain = PlainText(source.control_texts)
        self._compiled: dict[str, Template] = {}
        if "default" in source.templates:
            self._template("default")

    def render(self, conversation: Conversation) -> str:
        """Return the conversation's text, ready for the assistant's answer.

        Raises:
            Exception: any that the template raises, and a TemplateError that says what else is wrong.
        """
        tools = [_object(f"tools[{index}]", tool) for index, tool in enumerate(conversation.tools)]
        messages = [self._message(index, *message) for index, message in enumerate(conversation.messages)]
        variables = _object("variables", conversation.variables) if conversation.variables else {}
        if mine := sorted(_OWN & variables.keys()):
            raise TemplateError(f"{mine[0]} is no variable to be set like this; the request has a field for it")
        continued = _tag_continued(messages) if conversation.continue_final_message else None
        own = {
            "messages": messages,
            "add_generation_prompt": conversation.add_generation_prompt,
            "tools": tools or None,
        }
        text = self._template(self._name(conversation)).render(
            self._source.special_tokens | {"documents": None} | variables | own
        )
        return text if continued is None else _cut_continued(text, continued)

    def _name(self, conversation: Conversation) -> str:
        known = self._source.templates
        if not conversation.template:
            return "tool_use" if conversation.tools and "tool_use" in known else "default"
        return conversation.template

    def _template(self, name: str) -> Template:
        if name not in self._source.templates:
            known = ", ".join(sorted(self._source.templates))
            raise TemplateError(f"the model has no template {name[:_MAX_SHOWN]!r}; it has {known}")
        if name not in self._compiled:
            self._compiled[name] = self._environment.from_string(self._source.templates[name])
        return self._compiled[name]

    def _message(self, index: int, role: str, content: str, fields: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": role, "content": content}
        if fields:
            message |= _object(f"messages[{index}]", fields) | {"role": role}
        reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        return self._plain.of(message) if role in PLAIN_ROLES else message


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TemplateError(f"{name} can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise TemplateError(f"{name} is no JSON object")
    return cast("dict[str, Any]", value)


def _tag_continued(messages: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's text, which is returned."""
    content = messages[-1]["content"]
    if not isinstance(content, str):
        raise TemplateError("the last message has no text to go on from")
    messages[-1]["content"] = content + _CONTINUED_TAG
    return content


def _cut_continued(text: str, content: str) -> str:
    """Return the text as far as the mark; without white space before it where the template drops that."""
    place = text.rfind(_CONTINUED_TAG.strip())
    if place < 0 or content.strip() not in text:
        raise TemplateError("the template does not show the last message as it is, so it can't be gone on from")
    is_kept = text[place : place + len(_CONTINUED_TAG)] == _CONTINUED_TAG
    return text[:place] if is_kept else text[:place].rstrip()


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: its body, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own name and type

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
