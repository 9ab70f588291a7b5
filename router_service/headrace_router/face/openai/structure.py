"""What an answer is to look like, as clients of OpenAI and of vLLM say it, and the grammar that this is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from headrace.v1 import types_pb2
from pydantic import Field

from headrace_router.face.http.errors import HttpError
from headrace_router.face.openai.body import Body

_ANY_OBJECT = {"type": "object"}


class JsonSchema(Body):
    """A schema with a name, of which only the schema is used."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="a JSON Schema; null: any object")
    strict: bool | None = Field(None, description="taken: answers are always held to the schema")


class ResponseFormat(Body):
    """OpenAI's way."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's way; one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON Schema")
    regex: str | None = Field(None, description="a regular expression")
    choice: list[str] | None = Field(None, description="one of these texts")
    grammar: str | None = Field(None, description="a grammar in Lark's syntax")
    json_object: bool | None = Field(None, description="any JSON object")


class Structured(Body):
    """Fields of a body that hold its answer to a grammar; one of them."""

    response_format: ResponseFormat | None = Field(None, description="`text`, `json_object` or `json_schema`")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="one of `json`, `regex`, `choice`, `grammar` (Lark's syntax) and `json_object`"
    )
    guided_json: dict[str, Any] | str | None = Field(None, description="a JSON Schema")
    guided_regex: str | None = Field(None, description="a regular expression, in the syntax of Rust's regex")
    guided_choice: list[str] | None = Field(None, description="texts, of which the answer is one")
    guided_grammar: str | None = Field(None, description="a context-free grammar in Lark's syntax")


def grammar_of(fields: Structured) -> tuple[str, types_pb2.Grammar] | None:
    """Return what an answer is held to, and the field that says so; None: nothing.

    Raises:
        HttpError: several are named, or one says nothing.
    """
    if fields.model_fields_set.isdisjoint(Structured.model_fields):
        return None  # as nearly all
    said = fields.structured_outputs or StructuredOutputs.model_validate({})
    found = {
        "response_format": _of_format(fields.response_format),
        "structured_outputs.json": _of_schema(said.json_),
        "structured_outputs.regex": _of_regex(said.regex),
        "structured_outputs.choice": _of_choice("structured_outputs.choice", said.choice),
        "structured_outputs.grammar": _of_lark(said.grammar),
        "structured_outputs.json_object": _of_schema(_ANY_OBJECT if said.json_object else None),
        "guided_json": _of_schema(fields.guided_json),
        "guided_regex": _of_regex(fields.guided_regex),
        "guided_choice": _of_choice("guided_choice", fields.guided_choice),
        "guided_grammar": _of_lark(fields.guided_grammar),
    }
    named = [(name, grammar) for name, grammar in found.items() if grammar is not None]
    if len(named) > 1:
        first, second = named[0][0], named[1][0]
        raise HttpError(f"an answer is held to one of `{first}` and `{second}`", param=second)
    return named[0] if named else None


def schema_grammar(schema: dict[str, Any] | str) -> types_pb2.Grammar:
    """Return a JSON Schema as a grammar."""
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return types_pb2.Grammar(json_schema=text)


def _of_format(said: ResponseFormat | None) -> types_pb2.Grammar | None:
    if said is None or said.type == "text":
        return None
    if said.type == "json_object":
        return schema_grammar(_ANY_OBJECT)
    if said.json_schema is None:
        raise HttpError("`response_format.json_schema` is missing", param="response_format.json_schema")
    schema = said.json_schema.schema_
    return schema_grammar(_ANY_OBJECT if schema is None else schema)


def _of_schema(schema: dict[str, Any] | str | None) -> types_pb2.Grammar | None:
    return None if schema is None else schema_grammar(schema)


def _of_regex(regex: str | None) -> types_pb2.Grammar | None:
    return None if regex is None else types_pb2.Grammar(regex=regex)


def _of_lark(lark: str | None) -> types_pb2.Grammar | None:
    return None if lark is None else types_pb2.Grammar(lark=lark)


def _of_choice(name: str, choice: Sequence[str] | None) -> types_pb2.Grammar | None:
    if choice is None:
        return None
    if not choice or not all(choice):
        raise HttpError(f"`{name}` must be texts that are not empty, at least one", param=name)
    texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in choice)
    return types_pb2.Grammar(lark=f"start: {texts}")
