"""`/v1/responses`: its body understood."""

from __future__ import annotations

from typing import Any

from headrace.v1 import generation_service_pb2, types_pb2
from headrace_core.request import MAX_COUNT

from headrace_router.face.http.errors import HttpError
from headrace_router.face.openai.messages import Templated, put_messages
from headrace_router.face.openai.parse import parse_body
from headrace_router.face.openai.request import Asked, Wanted, float32, put_level
from headrace_router.face.openai.responses_input import messages_of
from headrace_router.face.openai.responses_schema import ResponsesRequest
from headrace_router.face.openai.schema import StreamOptions
from headrace_router.face.openai.structure import schema_grammar
from headrace_router.face.openai.tools import call_form, forced_calls, text_parameters, tools_json

_ECHOED = {"instructions", "max_output_tokens", "temperature", "top_p", "user"}


def read_response(body: bytes, request_id: str) -> Asked:
    """Return what a body of /v1/responses asks for. Raises as `read_chat` does."""
    fields = parse_body(ResponsesRequest, body)
    sampling = _sampling(fields)
    tooled = fields.tooled()
    form = call_form(tooled)
    if form == "forced":
        if sampling.HasField("grammar"):
            raise HttpError("`tool_choice`: an answer is held to a call or to a format", param="tool_choice")
        sampling.grammar.CopyFrom(forced_calls(tooled))
    message = generation_service_pb2.GenerateRequest(request_id=request_id, model=fields.model, sampling=sampling)
    put_level(message, fields.service_tier)
    put_messages(message, messages_of(fields), Templated.model_construct(), tools_json(tooled))
    wanted = Wanted(
        prefix="resp",
        is_chat=True,
        is_streamed=bool(fields.stream),
        options=StreamOptions(),
        has_logprobs=False,
        has_token_ids=False,
        echo=False,
        call_form=form,
        texts=text_parameters(tooled),
        is_free=not sampling.HasField("grammar"),
        said=_said(fields),
    )
    return Asked([message], wanted, {"grammar": "tools"} if form == "forced" else {})


def _sampling(fields: ResponsesRequest) -> types_pb2.SamplingParams:
    sampling = types_pb2.SamplingParams(
        max_tokens=MAX_COUNT if fields.max_output_tokens is None else fields.max_output_tokens
    )
    if fields.temperature is not None:
        sampling.temperature = float32(fields.temperature)
    if fields.top_p is not None:
        sampling.top_p = float32(fields.top_p)
    form = fields.text.format if fields.text is not None else None
    if form is not None and form.type != "text":
        if form.type == "json_schema" and form.schema_ is None:
            raise HttpError("`text.format.schema` is missing", param="text.format.schema")
        sampling.grammar.CopyFrom(schema_grammar(form.schema_ or {"type": "object"}))
    return sampling


def _said(fields: ResponsesRequest) -> dict[str, Any]:
    """Return the fields that the answer repeats."""
    form = fields.text.format if fields.text is not None else None
    choice = fields.tool_choice
    return {
        **fields.model_dump(include=_ECHOED),
        "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
        "tools": [tool.model_dump() for tool in fields.tools or ()],
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
    }
