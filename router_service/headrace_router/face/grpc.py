"""The router's gRPC face: decode, delegate, encode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headrace.v1 import generation_service_pb2, generation_service_pb2_grpc, types_pb2
from headrace_core.door import Door
from headrace_core.wire import encode_finish

from headrace_router.callers.caller import caller_of
from headrace_router.callers.keys import Keys
from headrace_router.requests.piece import Piece
from headrace_router.router import Router

_MOST_TOKEN_BYTES = 256
"""What is longer is left out: a message holds a thousand tokens with twenty others each."""


class GenerationServicer(generation_service_pb2_grpc.GenerationServiceServicer):
    """Serves clients. Event loop only."""

    def __init__(self, router: Router, door: Door, keys: Keys | None) -> None:
        self._router = router
        self._caller_of = keys.caller_of if keys else caller_of
        self._door = door

    async def Generate(  # pyright: ignore[reportIncompatibleMethodOverride] - the stub knows generators alone
        self, request: generation_service_pb2.GenerateRequest, context: Any
    ) -> None:
        """Serve one request; see generation_service.proto. What comes while a message leaves goes into the next one."""
        running = await self._router.open(
            request,
            self._caller_of(context),
            context.time_remaining(),
            metadata=context.invocation_metadata() or (),
            on_failed=lambda: self._door.forget_message(context),
        )
        del request  # it may be large, and nobody needs it any more

        def on_done(_: Any) -> None:
            self._router.close(running)

        context.add_done_callback(on_done)
        spec = running.spec
        try:
            while (piece := await running.next()) is not None:
                await context.write(encode_piece(piece, spec.request_id, self._router.token_bytes, spec.prompt_ids))
        finally:
            self._router.close(running)

    async def GetServerInfo(
        self, request: generation_service_pb2.GetServerInfoRequest, context: Any
    ) -> generation_service_pb2.GetServerInfoResponse:
        """Say what is served and by whom."""
        del request, context
        return self._router.info()


def encode_piece(
    piece: Piece, request_id: str, token_bytes: Callable[[int], bytes], prompt_ids: Sequence[int] = ()
) -> generation_service_pb2.GenerateResponse:
    """Return the message. `token_bytes` says what a token stands for, which log-probabilities are sent with."""
    message = generation_service_pb2.GenerateResponse(
        sample_index=piece.sample_index, text=piece.text, token_ids=piece.token_ids
    )
    if piece.logprobs:
        message.logprobs.extend(piece.logprobs)
        for token_id, entry in zip(piece.token_ids, message.logprobs, strict=True):
            entry.token = _shown(token_bytes(token_id))
            for top in entry.top:
                top.token = _shown(token_bytes(top.token_id))
    if piece.prompt_logprobs is not None:
        _put_prompt(message.prompt_logprobs, piece.prompt_logprobs, prompt_ids, token_bytes)
    if piece.is_first:
        message.request_id = request_id
    if ending := piece.ending:
        message.finish_reason = encode_finish(ending.finish_reason)
        message.matched_stop_string = ending.matched_stop_string
        message.usage.num_prompt_tokens = ending.num_prompt_tokens
        message.usage.num_output_tokens = ending.num_output_tokens
        message.usage.num_cached_tokens = ending.num_cached_tokens
        if ending.timings is not None:
            message.timings.CopyFrom(ending.timings)
    return message


def _put_prompt(
    message: types_pb2.PromptLogprobs,
    logprobs: types_pb2.PromptLogprobs,
    prompt_ids: Sequence[int],
    token_bytes: Callable[[int], bytes],
) -> None:
    message.CopyFrom(logprobs)
    message.token_ids.extend(prompt_ids[logprobs.first_position :][: len(logprobs.logprobs)])
    message.tokens.extend([_shown(token_bytes(token_id)) for token_id in message.token_ids])
    message.top_tokens.extend([_shown(token_bytes(token_id)) for token_id in message.top_token_ids])


def _shown(token: bytes) -> bytes:
    return token if len(token) <= _MOST_TOKEN_BYTES else b""
