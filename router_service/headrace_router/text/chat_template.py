"""A model's chat template: what it may use, and how it becomes text.

Templates are written for transformers, so they find here what `apply_chat_template` gives them (transformers 5.23,
utils/chat_template_utils.py): loop controls, `tojson` with its four options, `raise_exception`, `strftime_now`, and
`{% generation %}`, which marks the assistant's words for training and renders its body.

The sandbox keeps a template from Python's internals, not from time or memory: it is compiled and rendered only in the
process of `chat_process.py`. Compiling counts: jinja computes constants, `2 ** 10 ** 9` too, when it compiles.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace_router.text.chat_protocol import TemplateSource


class ChatTemplate:
    """A compiled template. Compile and render where time and memory are bounded."""

    def __init__(self, source: TemplateSource) -> None:
        """Compile.

        Raises:
            Exception: any that jinja or a constant expression of the template raises.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.globals.update(functions)
        environment.filters["tojson"] = _to_json
        self._template = environment.from_string(source.text)
        self._variables = source.special_tokens

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return the text of a conversation of (role, content), ready for the assistant's answer.

        Raises:
            Exception: any that the template raises.
        """
        own = {
            "messages": [{"role": role, "content": content} for role, content in messages],
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        return self._template.render(self._variables | own)


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
