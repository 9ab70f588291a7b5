"""Messages of a conversation and what its template is told, as OpenAI's clients write them, and as gRPC's do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from headrace.v1 import generation_service_pb2
from pydantic import Field

from headrace_router.face.http.errors import HttpError
from headrace_router.face.openai.body import Body, Refused

_NO_FUNCTIONS = "send `tool_calls`"
_TEXT_ONLY = "text only"
_NOTHING = Annotated[list[Any], Field(max_length=0)]


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """What was called, with what."""

    name: str
    arguments: str = Field(description="a JSON object, as text")


class ToolCall(Body):
    """A call that the model asked for."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="taken, and used for nothing: the calls are in order")


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="`developer` is `system` for a template that does not know it"
    )
    content: str | list[TextPart] | None = Field(
        None, description="a text, or parts of type `text`, which are joined; null with `tool_calls`"
    )
    name: str | None = Field(None, description="for templates that know it")
    tool_calls: list[ToolCall] | None = Field(None, description="what the assistant called; `arguments` as JSON")
    tool_call_id: str | None = Field(None, description="of a tool, which must have it: which call it answers")
    reasoning_content: str | None = Field(None, description="what the assistant thought, for templates that show it")
    function_call: Annotated[None, Refused(_NO_FUNCTIONS)] = None
    refusal: Annotated[None, Refused(_TEXT_ONLY)] = None
    audio: Annotated[None, Refused(_TEXT_ONLY)] = None
    annotations: Annotated[_NOTHING | None, Refused(_TEXT_ONLY)] = None


class Templated(Body):
    """What a conversation's template is told besides its messages."""

    add_generation_prompt: bool | None = Field(
        None, description="write what begins an answer; default: unless `continue_final_message`"
    )
    continue_final_message: bool | None = Field(None, description="the answer goes on from the last message's text")
    chat_template: str | None = Field(
        None, max_length=64, description="the name of one of the model's templates; other templates are not taken"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="further variables for the template, such as `enable_thinking`"
    )
    documents: list[dict[str, Any]] | None = Field(None, description="for templates that know them")


def put_messages(
    message: generation_service_pb2.GenerateRequest,
    messages: Sequence[Message],
    told: Templated,
    tools: Sequence[str],
) -> None:
    """Make a conversation of `message`'s prompt. `tools` are JSON, as the template is told of them.

    Raises:
        HttpError: names what can't be told.
    """
    chat = message.chat
    chat.SetInParent()
    for index, each in enumerate(messages):
        parts = each.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        fields = _fields(index, each)
        chat.messages.add(role=each.role, content=text, fields_json=_dumps(fields) if fields else "")
    if told.add_generation_prompt is not None:
        chat.add_generation_prompt = told.add_generation_prompt
    if told.continue_final_message:
        if told.add_generation_prompt:
            problem = "`continue_final_message` goes on from a message, `add_generation_prompt` begins one"
            raise HttpError(problem, param="continue_final_message")
        chat.continue_final_message = True
    chat.template_name = told.chat_template or ""
    chat.tools_json.extend(tools)
    variables = dict(told.chat_template_kwargs or {})
    if told.documents is not None:
        variables["documents"] = told.documents
    if variables:
        chat.variables_json = _dumps(variables)


def _fields(index: int, message: Message) -> dict[str, Any]:
    """Return what a template is told of a message besides its role and text."""
    path = f"messages.{index}"
    fields = message.model_dump(include={"name", "tool_call_id", "reasoning_content"}, exclude_none=True)
    if message.role == "tool" and not message.tool_call_id:
        raise HttpError(f"`{path}.tool_call_id` is missing", param=f"{path}.tool_call_id")
    if message.content is None:
        if not message.tool_calls:
            raise HttpError(f"`{path}.content` is missing", param=f"{path}.content")
        fields["content"] = None
    if message.tool_calls:
        fields["tool_calls"] = [
            _call(f"{path}.tool_calls.{number}", call) for number, call in enumerate(message.tool_calls)
        ]
    return fields


def _call(path: str, call: ToolCall) -> dict[str, Any]:
    """Return a call with its arguments as an object: templates write them in their own way."""
    arguments = arguments_of(call.function.arguments, f"{path}.function.arguments")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def arguments_of(text: str, name: str) -> dict[str, Any]:
    """Return what a call's arguments are.

    Raises:
        HttpError: `name`, by which the text's sender knows it, is no JSON object.
    """
    try:
        arguments: object = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise HttpError(f"`{name}` must be a JSON object, as text", param=name)
    return cast("dict[str, Any]", arguments)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
