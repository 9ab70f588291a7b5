"""Tools that clients name, and the grammar that holds an answer to calls of them.

An answer that must call is JSON of one form, whatever the model: `[{"name":"f","arguments":{…}},…]`, without spaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

from headrace.v1 import types_pb2
from pydantic import Field

from headrace_router.face.http.errors import HttpError
from headrace_router.face.openai.body import Body
from headrace_router.face.openai.structure import schema_grammar

CHOICES = "`none`, `auto` (default; for templates whose calls are known), `required`, or a named function"
PARALLEL = "default true: an answer may call several times; false not with `auto`"
_DEFINITIONS = ("$defs", "definitions")
_NO_WHITE_SPACE = {"whitespace_flexible": False, "whitespace_pattern": None}


class Function(Body):
    """What may be called, with what."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="1 to 64 characters of [A-Za-z0-9_-]")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON Schema of type object; null: any object")
    strict: bool | None = Field(None, description="taken: an answer that must call is always held to the schema")


class Tool(Body):
    """One tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """Which function."""

    name: str


class NamedTool(Body):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class Tooled(Body):
    """What a body says of tools."""

    tools: Annotated[list[Tool], Field(max_length=128)] | None = Field(
        None, description="functions, up to 128, which the template is told of"
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(None, description=CHOICES)
    parallel_tool_calls: bool | None = Field(None, description=PARALLEL)


CallForm = Literal["", "tagged", "forced"]
"""How an answer calls: not at all, in the template's tags if it likes, as the grammar has it."""


def call_form(fields: Tooled) -> CallForm:
    """Return how an answer is to call.

    Raises:
        HttpError: what is asked for contradicts itself, or is not served.
    """
    tools, choice = fields.tools or [], fields.tool_choice
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise HttpError("`tools`: two functions have one name", param="tools")
    if choice is None or choice == "none":
        form: CallForm = "tagged" if choice is None and tools else ""
    elif not tools:
        if choice != "auto":
            raise HttpError("`tool_choice` needs `tools`", param="tool_choice")
        form = ""
    elif isinstance(choice, NamedTool) and choice.function.name not in names:
        problem = f"`tool_choice`: {choice.function.name[:64]!r} is none of `tools`"
        raise HttpError(problem, param="tool_choice")
    else:
        form = "tagged" if choice == "auto" else "forced"
    if form == "tagged" and fields.parallel_tool_calls is False:
        problem = "`parallel_tool_calls` false is served with `tool_choice` `required` or a named function alone"
        raise HttpError(problem, param="parallel_tool_calls")
    return form


def text_parameters(fields: Tooled) -> dict[str, frozenset[str]]:
    """Return, of each function, the parameters that its schema says are texts."""
    found: dict[str, frozenset[str]] = {}
    for tool in fields.tools or []:
        properties = (tool.function.parameters or {}).get("properties")
        named = cast("dict[str, Any]", properties) if isinstance(properties, dict) else {}
        found[tool.function.name] = frozenset(name for name, said in named.items() if _is_text(said))
    return found


def _is_text(schema: object) -> bool:
    return isinstance(schema, dict) and cast("dict[str, object]", schema).get("type") == "string"


def tools_json(fields: Tooled) -> list[str]:
    """Return the tools as templates are told of them."""
    return [json.dumps(tool.model_dump(exclude_none=True), ensure_ascii=False) for tool in fields.tools or []]


def forced_calls(fields: Tooled) -> types_pb2.Grammar:
    """Return what holds an answer to calls.

    Raises:
        HttpError: a function's parameters can't be held to.
    """
    choice = fields.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else None
    definitions: dict[str, dict[str, Any]] = {name: {} for name in _DEFINITIONS}
    calls = [
        _call(tool.function, definitions) for tool in fields.tools or [] if named is None or tool.function.name == named
    ]
    schema: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
    if named is not None or fields.parallel_tool_calls is False:
        schema["maxItems"] = 1
    schema |= {name: defined for name, defined in definitions.items() if defined}
    return schema_grammar(schema | {"x-guidance": _NO_WHITE_SPACE})


def _call(function: Function, definitions: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of a call; what its parameters define goes where references look for it, to the root's."""
    parameters = dict(function.parameters or {"type": "object"})
    param = f"`parameters` of {function.name}"
    if parameters.setdefault("type", "object") != "object":
        raise HttpError(f"`tools`: {param} must be of type object", param="tools")
    for name, ours in definitions.items():
        theirs = parameters.pop(name, None) or {}
        if not isinstance(theirs, dict):
            raise HttpError(f"`tools`: {param}: {name} must be an object", param="tools")
        for key, value in cast("dict[str, Any]", theirs).items():
            if ours.setdefault(key, value) != value:
                problem = f"`tools`: {param}: another function defines {key[:64]!r} otherwise; name them differently"
                raise HttpError(problem, param="tools")
    _check_references(parameters, param)
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _check_references(value: object, param: str) -> None:
    """Refuse references to what is elsewhere once the schema is part of another."""
    values: Sequence[object] = ()
    if isinstance(value, dict):
        fields = cast("dict[str, object]", value)
        reference = fields.get("$ref")
        if isinstance(reference, str) and not reference.startswith(tuple(f"#/{name}/" for name in _DEFINITIONS)):
            problem = f"`tools`: {param}: {reference[:64]!r} refers to none of {' and '.join(_DEFINITIONS)}"
            raise HttpError(problem, param="tools")
        values = list(fields.values())
    elif isinstance(value, list):
        values = cast("list[object]", value)
    for each in values:
        _check_references(each, param)
