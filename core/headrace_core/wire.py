"""Between the wire's messages and the values of `request`, `kv.layout` and `errors`.

Decoding checks; encoding can't fail.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import grpc
from headrace.v1 import decode_service_pb2, types_pb2

from headrace_core.errors import HeadraceError, InvalidRequestError, ProtocolError
from headrace_core.kv.layout import CacheDtype, KeyValueAttention, KvLayout, LatentAttention
from headrace_core.request import (
    MAX_ENTRIES,
    FinishReason,
    Grammar,
    GrammarKind,
    PromptLogprobs,
    SamplingParams,
    TokenLogprobs,
    check_num_entries,
)
from headrace_core.rpc import from_status, status_code

_OPTIONAL_SCALARS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "min_tokens", "ignore_eos", "top_logprobs", "prompt_logprobs",
)  # fmt: skip

_DTYPE_TO_WIRE = {
    CacheDtype.FLOAT32: types_pb2.CACHE_DTYPE_FLOAT32,
    CacheDtype.BFLOAT16: types_pb2.CACHE_DTYPE_BFLOAT16,
    CacheDtype.FLOAT16: types_pb2.CACHE_DTYPE_FLOAT16,
    CacheDtype.FP8_E4M3: types_pb2.CACHE_DTYPE_FP8_E4M3,
}
_DTYPE_FROM_WIRE = {wire: dtype for dtype, wire in _DTYPE_TO_WIRE.items()}

_FINISH_TO_WIRE: dict[FinishReason, types_pb2.FinishReason.ValueType] = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def decode_sampling(message: types_pb2.SamplingParams, defaults: SamplingParams | None = None) -> SamplingParams:
    """Return the checked parameters; of a token named twice the last entry counts.

    An unset scalar is that of `defaults`, None: the wire's own.

    Raises:
        InvalidRequestError: BAD_SAMPLING, BAD_GRAMMAR.
    """
    for name in MAX_ENTRIES:
        check_num_entries(name, len(getattr(message, name)))  # before anything is made of them
    scalars: dict[str, Any] = {
        name: without_float32(getattr(message, name))
        for name in _OPTIONAL_SCALARS
        if message.HasField(name)  # pyright: ignore[reportArgumentType]
    }
    params = replace(
        defaults or SamplingParams(),
        **scalars,
        stop_token_ids=tuple(dict.fromkeys(message.stop_token_ids)),
        stop_strings=tuple(message.stop_strings),
        logit_bias={entry.token_id: entry.bias for entry in message.logit_bias},
        grammar=_decode_grammar(message.grammar) if message.HasField("grammar") else None,
    )
    params.validate()
    return params


def _decode_grammar(message: types_pb2.Grammar) -> Grammar:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequestError("BAD_GRAMMAR", "the grammar has no kind, or one that this version does not know")
    return Grammar(GrammarKind(kind), getattr(message, kind))


def without_float32(value: float) -> float:
    """Undo what float32 did to a short decimal, so that 0.7 is 0.7 in every process and message."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def encode_sampling(params: SamplingParams) -> types_pb2.SamplingParams:
    """Return the message; every scalar that has a value is set."""
    message = types_pb2.SamplingParams(
        stop_token_ids=params.stop_token_ids,
        stop_strings=params.stop_strings,
        logit_bias=[types_pb2.LogitBias(token_id=token_id, bias=bias) for token_id, bias in params.logit_bias.items()],
    )
    for name in _OPTIONAL_SCALARS:
        value = getattr(params, name)
        if value is not None:
            setattr(message, name, value)
    if params.grammar is not None:
        setattr(message.grammar, params.grammar.kind.value, params.grammar.text)
    return message


def decode_layout(message: types_pb2.KvLayout) -> KvLayout:
    """Return the layout.

    Raises:
        InvalidRequestError: BAD_HANDOFF, a part is missing, zero or unknown, or the parts do not fit each other.
    """
    dtype = _DTYPE_FROM_WIRE.get(message.dtype)
    kind = message.WhichOneof("attention")
    if dtype is None or kind is None or not message.num_layers or not message.page_size:
        raise InvalidRequestError(
            "BAD_HANDOFF", "the layout lacks dtype (or one that this version knows), attention, layers or page size"
        )
    attention = (
        LatentAttention(message.latent.kv_lora_rank, message.latent.rope_dim, message.latent.index_dim)
        if kind == "latent"
        else KeyValueAttention(message.key_value.num_kv_heads, message.key_value.head_dim)
    )
    try:
        layout = KvLayout(message.num_layers, message.page_size, dtype, attention)
    except ValueError as error:
        raise InvalidRequestError("BAD_HANDOFF", f"the layout can't be: {error}") from error
    if not layout.page_bytes:
        raise InvalidRequestError("BAD_HANDOFF", "the layout's attention has a width of 0")
    return layout


def encode_layout(layout: KvLayout) -> types_pb2.KvLayout:
    """Return the message."""
    message = types_pb2.KvLayout(
        num_layers=layout.num_layers, page_size=layout.page_size, dtype=_DTYPE_TO_WIRE[layout.dtype]
    )
    match layout.attention:
        case LatentAttention(kv_lora_rank, rope_dim, index_dim):
            message.latent.kv_lora_rank = kv_lora_rank
            message.latent.rope_dim = rope_dim
            message.latent.index_dim = index_dim
        case KeyValueAttention(num_kv_heads, head_dim):
            message.key_value.num_kv_heads = num_kv_heads
            message.key_value.head_dim = head_dim
    return message


def decode_finish(value: types_pb2.FinishReason.ValueType) -> FinishReason | None:
    """Return the reason; None when unset.

    Raises:
        ProtocolError: PROTOCOL, a value this version does not know.
    """
    if value == types_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    if value not in _FINISH_FROM_WIRE:
        raise ProtocolError("PROTOCOL", f"unknown finish reason {value}; is a peer newer than this process?")
    return _FINISH_FROM_WIRE[value]


def encode_finish(reason: FinishReason | None) -> types_pb2.FinishReason.ValueType:
    """Return the wire's value; unspecified for None."""
    return _FINISH_TO_WIRE[reason] if reason else types_pb2.FINISH_REASON_UNSPECIFIED


def decode_logprobs(message: types_pb2.TokenLogprobs) -> TokenLogprobs:
    """Return the value."""
    return TokenLogprobs(message.logprob, tuple((top.token_id, top.logprob) for top in message.top))


def encode_logprobs(logprobs: TokenLogprobs) -> types_pb2.TokenLogprobs:
    """Return the message."""
    return types_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top=[types_pb2.TopLogprob(token_id=token, logprob=value) for token, value in logprobs.top],
    )


def encode_prompt_logprobs(logprobs: PromptLogprobs) -> types_pb2.PromptLogprobs:
    """Return the message."""
    return types_pb2.PromptLogprobs(
        first_position=logprobs.first,
        logprobs=logprobs.logprobs,
        ranks=logprobs.ranks,
        top_token_ids=logprobs.top_ids,
        top_logprobs=logprobs.top_logprobs,
    )


def decode_failure(message: decode_service_pb2.Failure) -> HeadraceError:
    """Return the error a sequence failed with."""
    code = _CODES.get(message.code, grpc.StatusCode.UNKNOWN)
    return from_status(code, message.reason, message.message)


def encode_failure(error: HeadraceError, side: decode_service_pb2.FailureSide.ValueType) -> decode_service_pb2.Failure:
    """Return the message."""
    return decode_service_pb2.Failure(
        code=status_code(error).value[0], reason=error.reason, message=str(error), side=side
    )
