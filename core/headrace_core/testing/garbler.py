"""Lets a server of a test answer with whatever bytes the test wants, on a wire that is real."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

Rewrite = Callable[[bytes], bytes]
NO_MESSAGE = b"\xff\xff\xff\xff"
"""Bytes that no protobuf message has."""


class Garbler(grpc.aio.ServerInterceptor):
    """Rewrites what methods answer. Comes first among a server's interceptors.

    `rewrites` is by the method's name, without its service; it may change while the server serves, streams included.
    """

    def __init__(self) -> None:
        self.rewrites: dict[str, Rewrite] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler that serves this call."""
        handler: Any = await continuation(handler_call_details)
        details: Any = handler_call_details
        name: str = details.method.rpartition("/")[2]
        if handler is None:
            return None

        def serialize(message: Any) -> bytes:
            content = handler.response_serializer(message)
            rewrite = self.rewrites.get(name)
            return rewrite(content) if rewrite else content

        # `rpc.Boundary`, which comes behind, makes every handler one of these.
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(handler.stream_unary, handler.request_deserializer, serialize)
        return grpc.stream_stream_rpc_method_handler(handler.stream_stream, handler.request_deserializer, serialize)


def no_message(content: bytes) -> bytes:
    """Rewrite an answer to bytes that can't be decoded."""
    del content
    return NO_MESSAGE


def rewriting(message: type[Any], change: Callable[[Any], None]) -> Rewrite:
    """Return a rewrite that lets `change` change the decoded answer."""

    def rewrite(content: bytes) -> bytes:
        decoded = message.FromString(content)
        change(decoded)
        return decoded.SerializeToString()

    return rewrite
