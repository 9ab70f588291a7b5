"""`/v1/responses`: its body understood."""

from __future__ import annotations

from headrace.v1 import generation_service_pb2, types_pb2
from headrace_core.request import MAX_COUNT

from headrace_router.face.http.errors import HttpError
from headrace_router.face.openai.parse import parse_body
from headrace_router.face.openai.request import Asked, Wanted, float32, put_level
from headrace_router.face.openai.responses_schema import ResponsesRequest
from headrace_router.face.openai.schema import StreamOptions
from headrace_router.face.openai.structure import schema_grammar


def read_response(body: bytes, request_id: str) -> Asked:
    """Return what a body of /v1/responses asks for. Raises as `read_chat` does."""
    fields = parse_body(ResponsesRequest, body)
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
    message = generation_service_pb2.GenerateRequest(request_id=request_id, model=fields.model, sampling=sampling)
    put_level(message, fields.service_tier)
    message.chat.SetInParent()
    if fields.instructions is not None:
        message.chat.messages.add(role="system", content=fields.instructions)
    if isinstance(fields.input, str):
        message.chat.messages.add(role="user", content=fields.input)
    else:
        for item in fields.input:
            parts = item.content
            text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
            message.chat.messages.add(role=item.role, content=text)
    echoed = {"instructions", "max_output_tokens", "temperature", "top_p", "user"}
    wanted = Wanted(
        prefix="resp",
        is_chat=True,
        is_streamed=bool(fields.stream),
        options=StreamOptions(),
        has_logprobs=False,
        has_token_ids=False,
        echo=False,
        said={
            **fields.model_dump(include=echoed),
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
        },
    )
    return Asked([message], wanted)
