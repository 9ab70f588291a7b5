"""The endpoints' own description, and the table of docs/http.md: both written from the schema.

`python -m headrace_router.face.openai.openapi` prints the table.
"""

from __future__ import annotations

import sys
from typing import Any

from headrace_core import __version__
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from headrace_router.face.openai.body import Refused
from headrace_router.face.openai.messages import Message
from headrace_router.face.openai.responses_schema import (
    FunctionCall,
    FunctionCallOutput,
    InputItem,
    ReasoningItem,
    ResponsesRequest,
)
from headrace_router.face.openai.schema import ChatRequest, CompletionRequest, TokenizeRequest

_REF = "#/components/schemas/{model}"
_BODIES: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/completions": (CompletionRequest, "Go on from a prompt"),
    "/v1/chat/completions": (ChatRequest, "Answer a conversation"),
    "/v1/responses": (ResponsesRequest, "Answer a text or a conversation"),
    "/tokenize": (TokenizeRequest, "Say what tokens a prompt has"),
}
_GETS = {
    "/v1/models": "Say which model is served",
    "/health": "Say that the process lives",
    "/ready": "Say whether it takes requests",
    "/metrics": "Show Prometheus metrics",
}
_STATUSES = {
    "200": "an answer, or a stream of server-sent events",
    "400": "no JSON, a field unknown, not served or of a wrong type, a prompt too long",
    "401": "no key, or none of ours",
    "403": "the certificate's role may not call this",
    "404": "no such model or path",
    "408": "the body took too long",
    "413": "the body is too large",
    "415": "the body is not said to be JSON",
    "422": "a value out of its range, or a token that the model has not",
    "429": "no room, or the key's minute is used up; Retry-After says when to come again",
    "500": "an error of ours",
    "503": "no workers, or stopping",
    "504": "the time was up",
}


def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    models = [(model, "validation") for model, _ in _BODIES.values()]
    _, schemas = models_json_schema(models, ref_template=_REF)  # pyright: ignore[reportArgumentType]
    responses = {status: {"description": text} for status, text in _STATUSES.items()}
    paths: dict[str, Any] = {}
    for path, (model, summary) in _BODIES.items():
        content = {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}
        body = {"required": True, "content": content}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": responses}}
    for path, summary in _GETS.items():
        some = {status: responses[status] for status in ("200", "401", "403", "429", "500", "503")}
        paths[path] = {"get": {"summary": summary, "responses": some}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headrace", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def table() -> str:
    """Return the table of fields of docs/http.md, in Markdown."""
    columns = {"completions": CompletionRequest, "chat": ChatRequest}
    names = dict.fromkeys(name for model in columns.values() for name in model.model_fields)
    lines = ["| field | completions | chat | |", "|---|---|---|---|"]
    for name in names:
        said = [_say(model, name) for model in columns.values()]
        lines.append(
            f"| `{name}` | {' | '.join(word for word, _ in said)} | {next(text for _, text in said if text)} |"
        )
    for name in Message.model_fields:
        word, text = _say(Message, name)
        lines.append(f"| `messages[].{name}` | | {word} | {text} |")
    lines += ["", "`/tokenize`:", "", "| field | | |", "|---|---|---|"]
    lines += [f"| `{name}` | {' | '.join(_say(TokenizeRequest, name))} |" for name in TokenizeRequest.model_fields]
    lines += ["", "`/v1/responses`:", "", "| field | | |", "|---|---|---|"]
    lines += [f"| `{name}` | {' | '.join(_say(ResponsesRequest, name))} |" for name in ResponsesRequest.model_fields]
    items: dict[str, tuple[str, str]] = {}
    for model in (InputItem, FunctionCall, FunctionCallOutput, ReasoningItem):
        for name in model.model_fields:
            items.setdefault(name, _say(model, name))
    lines += [f"| `input[].{name}` | {' | '.join(said)} |" for name, said in items.items()]
    return "\n".join(lines) + "\n"


def _say(model: type[BaseModel], name: str) -> tuple[str, str]:
    """Return what becomes of a field, and more about it."""
    field = model.model_fields.get(name)
    if field is None:
        return "refused, unknown", ""
    refused = next((each for each in field.metadata if isinstance(each, Refused)), None)
    if refused is None:
        return "accepted", field.description or ""
    return "refused", refused.why


if __name__ == "__main__":
    sys.stdout.write(table())
