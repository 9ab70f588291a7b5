"""Who may call: TLS credentials and the bearer token."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from headrace_core.errors import StartupError
from headrace_core.rpc import REASON_KEY

_PROTECTED = "/headrace."
"""Health and reflection stay open: probes have no token."""


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls of our own services without `authorization: Bearer <token>`: UNAUTHENTICATED, BAD_TOKEN_AUTH."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Let the call through, or put a refusal in its handler's place."""
        handler: Any = await continuation(handler_call_details)
        details: Any = handler_call_details
        if handler is None or not details.method.startswith(_PROTECTED):
            return handler
        sent: str | bytes = dict(details.invocation_metadata or ()).get("authorization", "")
        sent = sent if isinstance(sent, bytes) else sent.encode()
        if hmac.compare_digest(sent, self._expected):
            return handler
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(_refuse, handler.request_deserializer, handler.response_serializer)


async def _refuse(_request: Any, context: Any) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "send the router's token as metadata `authorization: Bearer <token>`",
        ((REASON_KEY, "BAD_TOKEN_AUTH"),),
    )


def server_credentials(cert: Path | None, key: Path | None) -> grpc.ServerCredentials | None:
    """Return credentials from PEM files; None if neither is given.

    Raises:
        StartupError: BAD_TLS, one is missing or can't be read.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise StartupError("BAD_TLS", "--tls-cert and --tls-key come together")
    try:
        pair = (key.read_bytes(), cert.read_bytes())
    except OSError as error:
        raise StartupError("BAD_TLS", f"can't read the TLS files: {error}") from error
    return grpc.ssl_server_credentials([pair])
