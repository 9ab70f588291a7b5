"""From OpenAI's fields to the request that gRPC's clients send, and how its answer is wanted.

What OpenAI leaves out it defines: a completion has 16 tokens at most, a conversation's answer what the context leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from headrace.v1 import generation_service_pb2, types_pb2
from headrace_core.request import MAX_COUNT, check_num_entries

from headrace_router.face.http.errors import HttpError
from headrace_router.face.openai.messages import Templated, put_messages
from headrace_router.face.openai.names import Names
from headrace_router.face.openai.parse import parse_body
from headrace_router.face.openai.schema import (
    ChatRequest,
    CompletionRequest,
    StreamOptions,
    TokenizeRequest,
)
from headrace_router.face.openai.structure import grammar_of
from headrace_router.face.openai.tools import CallForm, Tooled, call_form, forced_calls, text_parameters, tools_json

_DEFAULT_COMPLETION_TOKENS = 16
MAX_CHOICES = 128
"""Of one body: `n` for each prompt."""
_SAME_NAME = (
    "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty",
    "min_tokens", "ignore_eos",
)  # fmt: skip
"""Fields that gRPC's `SamplingParams` calls alike."""
_MOST_FLOAT32 = 3.4028235e38


@dataclass(frozen=True, slots=True)
class Wanted:
    """How an answer is to look."""

    prefix: str
    """Of its id."""
    is_chat: bool
    is_streamed: bool
    options: StreamOptions
    has_logprobs: bool
    has_token_ids: bool
    echo: bool
    has_prompt_logprobs: bool = False
    """As vLLM says them."""
    call_form: CallForm = ""
    texts: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    """Of each function that may be called the parameters that are texts."""
    is_free: bool = True
    """Not held to a grammar: it may think first."""
    said: dict[str, Any] = field(default_factory=dict[str, Any])
    """Fields that the answer repeats."""


@dataclass(slots=True)
class Asked:
    """A body, understood."""

    messages: list[generation_service_pb2.GenerateRequest]
    """One for each prompt."""
    wanted: Wanted
    names: Names = field(default_factory=dict[str, str])
    """Of this body's fields, where they are not the endpoint's."""


def read_chat(body: bytes, request_id: str) -> Asked:
    """Return what a body of /v1/chat/completions asks for.

    Raises:
        InvalidRequestError: it can't be served as written; an `HttpError` names the field.
    """
    fields = parse_body(ChatRequest, body)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise HttpError("`top_logprobs` needs `logprobs`", param="top_logprobs")
    max_tokens = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    if fields.max_tokens not in (None, max_tokens):
        raise HttpError("`max_completion_tokens` is not `max_tokens`; send one of them", param="max_completion_tokens")
    top_logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    message, names = _message(fields, request_id, MAX_COUNT if max_tokens is None else max_tokens, top_logprobs)
    if fields.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    form = call_form(fields)
    if form == "forced":
        if message.sampling.HasField("grammar"):
            raise HttpError("`tool_choice`: an answer is held to a call or to a format", param="tool_choice")
        message.sampling.grammar.CopyFrom(forced_calls(fields))
        names["grammar"] = "tools"
    put_messages(message, fields.messages, fields, tools_json(fields))
    wanted = _wanted(fields, is_chat=True, has_logprobs=bool(fields.logprobs), echo=False)
    is_free = not message.sampling.HasField("grammar")
    return Asked([message], replace(wanted, call_form=form, texts=text_parameters(fields), is_free=is_free), names)


def read_completion(body: bytes, request_id: str) -> Asked:
    """Return what a body of /v1/completions asks for. Raises as `read_chat` does."""
    fields = parse_body(CompletionRequest, body)
    has_logprobs, echo = fields.logprobs is not None, bool(fields.echo)
    if echo and has_logprobs and fields.prompt_logprobs is not None:
        raise HttpError("`echo` with `logprobs` has the prompt's, too", param="prompt_logprobs")
    max_tokens = _DEFAULT_COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
    message, names = _message(fields, request_id, max_tokens, fields.logprobs)
    if echo and fields.logprobs is not None:
        _check_prompt_logprobs(fields, "echo")
        message.sampling.prompt_logprobs = fields.logprobs
        names["prompt_logprobs"] = "logprobs"
    prompt = fields.prompt if fields.prompt_token_ids is None else fields.prompt_token_ids
    if fields.prompt is not None and fields.prompt_token_ids is not None:
        raise HttpError("send one of `prompt` and `prompt_token_ids`", param="prompt")
    prompts = _each_prompt(prompt)
    messages = [_with_prompt(message, each) for each in prompts] if len(prompts) > 1 else [message]
    if len(prompts) == 1:
        _put_prompt(message, prompts[0])
    num_choices = len(messages) * (fields.n or 1)
    if num_choices > MAX_CHOICES:
        raise HttpError(f"`prompt`: {num_choices} choices in all; at most {MAX_CHOICES}", param="prompt")
    return Asked(messages, _wanted(fields, is_chat=False, has_logprobs=has_logprobs, echo=echo), names)


def read_tokenize(body: bytes) -> generation_service_pb2.GenerateRequest:
    """Return a request that has the prompt that a body of /tokenize asks for. Raises as `read_chat` does."""
    fields = parse_body(TokenizeRequest, body)
    if (fields.prompt is None) == (fields.messages is None):
        raise HttpError("send one of `prompt` and `messages`", param="prompt")
    message = generation_service_pb2.GenerateRequest(model=fields.model)
    if fields.messages is not None:
        call_form(fields)  # tools may contradict themselves
        put_messages(message, fields.messages, fields, tools_json(fields))
    else:
        for name in (*Templated.model_fields, *Tooled.model_fields):
            if getattr(fields, name) is not None:
                raise HttpError(f"`{name}` needs `messages`; a `prompt` has no template", param=name)
        message.text.text = fields.prompt or ""
    return message


def _wanted(fields: ChatRequest | CompletionRequest, *, is_chat: bool, has_logprobs: bool, echo: bool) -> Wanted:
    if fields.stream_options is not None and not fields.stream:
        raise HttpError("`stream_options` needs `stream`", param="stream_options")
    return Wanted(
        prefix="chatcmpl" if is_chat else "cmpl",
        is_chat=is_chat,
        is_streamed=bool(fields.stream),
        options=fields.stream_options or StreamOptions(),
        has_logprobs=has_logprobs,
        has_token_ids=bool(fields.return_token_ids),
        echo=echo,
        has_prompt_logprobs=fields.prompt_logprobs is not None,
    )


def _message(
    fields: ChatRequest | CompletionRequest, request_id: str, max_tokens: int, top_logprobs: int | None
) -> tuple[generation_service_pb2.GenerateRequest, dict[str, str]]:
    """Return the request, all but its prompt, and what some of its fields are called in the body."""
    names: dict[str, str] = {}
    sampling = types_pb2.SamplingParams(max_tokens=max_tokens, top_logprobs=top_logprobs)
    if fields.stop is not None:
        stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop
        check_num_entries("stop_strings", len(stop))
        sampling.stop_strings.extend(stop)
    if fields.stop_token_ids:
        check_num_entries("stop_token_ids", len(fields.stop_token_ids))
        sampling.stop_token_ids.extend(fields.stop_token_ids)
    if fields.logit_bias:
        check_num_entries("logit_bias", len(fields.logit_bias))
        sampling.logit_bias.extend(_bias(token, bias) for token, bias in fields.logit_bias.items())
    if (named := grammar_of(fields)) is not None:
        names["grammar"], grammar = named
        sampling.grammar.CopyFrom(grammar)
    for name in _SAME_NAME:
        value = getattr(fields, name)
        if value is not None:
            setattr(sampling, name, float32(value) if isinstance(value, float) else value)
    if fields.prompt_logprobs is not None:
        _check_prompt_logprobs(fields, "prompt_logprobs")
        if fields.stream:
            raise HttpError("`prompt_logprobs` is not served with `stream`", param="prompt_logprobs")
        sampling.prompt_logprobs = fields.prompt_logprobs
    if fields.top_k is not None:
        sampling.top_k = max(0, fields.top_k)
    message = generation_service_pb2.GenerateRequest(request_id=request_id, model=fields.model, sampling=sampling)
    if fields.n is not None:
        message.n = fields.n
    message.priority = fields.priority or 0
    put_level(message, fields.service_tier, fields.slo_ttft_ms, fields.slo_itl_ms)
    return message, names


def put_level(
    message: generation_service_pb2.GenerateRequest,
    tier: str | None,
    ttft_ms: int | None = None,
    itl_ms: int | None = None,
) -> None:
    """Say how soon tokens should come; what the router calls a class is OpenAI's service tier."""
    if tier and tier not in ("auto", "default"):
        message.service_level.slo_class = tier
    if ttft_ms is not None:
        message.service_level.ttft_ms = ttft_ms
    if itl_ms is not None:
        message.service_level.itl_ms = itl_ms


def _check_prompt_logprobs(fields: ChatRequest | CompletionRequest, name: str) -> None:
    if (fields.n or 1) > 1:
        raise HttpError(f"`n` must be 1 with log-probabilities of the prompt, which `{name}` asks for", param="n")


def _bias(token: str, bias: float) -> types_pb2.LogitBias:
    if not (token.isascii() and token.isdecimal() and len(token) <= len(str(MAX_COUNT)) and int(token) <= MAX_COUNT):
        raise HttpError(f"`logit_bias`: {token[:32]!r} is no token id", param="logit_bias")
    return types_pb2.LogitBias(token_id=int(token), bias=float32(bias))


def float32(value: float) -> float:
    """Return what protobuf takes: it refuses numbers that float32 has not, with an error of its own."""
    return min(max(value, -_MOST_FLOAT32), _MOST_FLOAT32)


def _each_prompt(
    prompt: str | list[int] | list[str] | list[list[int]] | None,
) -> Sequence[str | list[int]]:
    """Return the prompts of a list of them, of which a list of ids is one."""
    if prompt is None:
        raise HttpError("`prompt` is missing", param="prompt")
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt]  # pyright: ignore[reportReturnType] - of which the schema knows that it is of one type
    return prompt  # pyright: ignore[reportReturnType]


def _with_prompt(
    message: generation_service_pb2.GenerateRequest, prompt: str | list[int]
) -> generation_service_pb2.GenerateRequest:
    own = generation_service_pb2.GenerateRequest()
    own.CopyFrom(message)
    _put_prompt(own, prompt)
    return own


def _put_prompt(message: generation_service_pb2.GenerateRequest, prompt: str | list[int]) -> None:
    if isinstance(prompt, str):
        message.text.text = prompt
    else:
        message.tokens.token_ids.extend(prompt)
