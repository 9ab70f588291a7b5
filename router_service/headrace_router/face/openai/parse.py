"""From the bytes of a body to what is asked for: bounded work, and one error that names one field."""

from __future__ import annotations

from typing import Any, TypeVar

from headrace_core.errors import InvalidRequestError
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from headrace_router.face.http.errors import HttpError
from headrace_router.face.openai.body import SAYS_ITSELF, Refused

B = TypeVar("B", bound=BaseModel)

_SMALL_BYTES = 64 << 10
"""What a body may be made of is not counted below this."""
_MAX_OBJECTS = 16_384
"""Objects, lists and texts, as for messages of gRPC: of which a conversation may have many."""
_MAX_ENTRIES = 2 << 20
"""Entries of lists; a prompt of a million token ids fits."""
_QUOTES_PER_OBJECT = 8
_MOST_PROBLEM_CHARS = 300


def parse_body(schema: type[B], body: bytes) -> B:
    """Return the body as `schema` has it.

    Raises:
        HttpError: 400, it is no JSON, or a field is unknown, not served, or of a wrong type; names it.
        InvalidRequestError: PROMPT_TOO_LONG, it is made of too many parts.
    """
    if len(body) > _SMALL_BYTES:
        _check_parts(body)
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise _named(schema, error) from None


def _check_parts(body: bytes) -> None:
    """Count what JSON is made of before it is made: a byte may cost a hundred."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_quotes = plain.count(b'"')
    if num_quotes <= _MAX_OBJECTS * _QUOTES_PER_OBJECT:
        outside = b"".join(plain.split(b'"')[::2])
        num_objects = outside.count(b"{") + outside.count(b"[")
        if num_objects <= _MAX_OBJECTS and outside.count(b",") <= _MAX_ENTRIES:
            return
    raise InvalidRequestError(
        "PROMPT_TOO_LONG", f"the request is made of more than {_MAX_OBJECTS} parts, such as messages of a conversation"
    )


def _named(schema: type[BaseModel], error: ValidationError) -> HttpError:
    """Return the first problem as an error that names its field."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, place = problem["type"], problem["loc"]
    if kind == "json_invalid":
        return HttpError(f"the body is no JSON: {problem['msg']}")
    if not place:
        return HttpError("the body must be a JSON object")
    path, field, refused = _field_of(schema, place)
    if kind == "extra_forbidden":
        text = f"`{path}` is no field that this endpoint knows; leave it out, GET /openapi.json has those there are"
    elif kind == "missing":
        text = f"`{path}` is missing"
    elif kind == SAYS_ITSELF:
        text = f"`{path}` {problem['msg']}"
    elif refused is not None:
        text = f"`{path}` is not served with this value: {refused.why}"
    elif field is not None and field.description and len(place) > len(path.split(".")):  # it may be of several types
        text = f"`{path}` must be {field.description}"
    else:
        text = f"`{path}`: {problem['msg']}"
    return HttpError(text[:_MOST_PROBLEM_CHARS], param=path[:_MOST_PROBLEM_CHARS])


def _field_of(schema: type[BaseModel], place: tuple[int | str, ...]) -> tuple[str, FieldInfo | None, Refused | None]:
    """Return the path of a field as its sender would write it, what it is, and whether it is not served.

    pydantic's place also names the types that a value may have, of which a sender knows nothing.
    """
    path: list[str] = []
    models: list[type[BaseModel]] = [schema]
    field: FieldInfo | None = None
    refused: Refused | None = None
    for step in place:
        found = next((model.model_fields[step] for model in models if step in model.model_fields), None)
        if found is not None:
            field = found
            refused = next((each for each in found.metadata if isinstance(each, Refused)), refused)
            models = _models_in(found.annotation)
        of_type = next((model for model in models if model.__name__ == step), None)
        if of_type is not None and path:  # of several objects that a value may be, this one was read
            models = [of_type]
            continue
        if found is not None or isinstance(step, int) or not path or (models and _is_name(step)):
            path.append(str(step))
    return ".".join(path), field, refused


def _is_name(step: str) -> bool:
    return "[" not in step and step not in _TYPES


_TYPES = frozenset({"str", "int", "bool", "float", "none"})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the classes that a field's value may be an object of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for each in getattr(annotation, "__args__", ()) for model in _models_in(each)]
