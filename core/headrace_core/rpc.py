"""gRPC in one place: servers with health, reflection and error mapping; channels with sane limits.

The interceptor is where errors become statuses; `raised_from` is where statuses become errors again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headrace_core.errors import (
    ConflictError,
    DeadlineError,
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    LayoutMismatchError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    StartupError,
    TransferCorruptError,
    UnavailableError,
)

T = TypeVar("T")

log = logging.getLogger(__name__)

REASON_KEY = "headrace-reason"
MAX_MESSAGE_BYTES = 8 << 20
"""Largest control message; a prompt of a million token ids fits. Page frames are smaller."""

_REASON = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_MOST_MESSAGE_BYTES = 2000

_OWN = "/headrace."
"""Our own methods. Health and reflection map errors themselves, and health's Watch is a coroutine, no generator."""

# A stopped peer is noticed after about 10 s: a ping every 5 s, answered within 5 s.
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_LIMITS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
_SERVER_OPTIONS = [
    *_LIMITS,
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.so_reuseport", 0),
]
_CHANNEL_OPTIONS = [
    *_LIMITS,
    *_KEEPALIVE,
    ("grpc.initial_reconnect_backoff_ms", 200),
    # This one also bounds a connection attempt: a loaded peer needs more than a moment to answer.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


_BY_STATUS: dict[str, type[HeadraceError]] = {
    error.status: error
    for error in (
        InvalidRequestError,
        NotFoundError,
        ConflictError,
        LayoutMismatchError,
        OverloadedError,
        UnavailableError,
        HandoffLostError,
        TransferCorruptError,
        DeadlineError,
    )
}


def status_code(error: HeadraceError) -> grpc.StatusCode:
    """Return the status code that `error` becomes."""
    return grpc.StatusCode[error.status]


def from_status(code: grpc.StatusCode, reason: str, message: str) -> HeadraceError:
    """Return the error that a status stands for; an unknown code becomes a plain `HeadraceError`.

    A peer's words go on to logs, metrics and clients: a reason that has not a reason's form is replaced by the code's
    name, and a long message is cut.
    """
    reason = reason if _REASON.fullmatch(reason) else code.name
    return _BY_STATUS.get(code.name, HeadraceError)(reason, _cut(message))


def _cut(message: str) -> str:
    """Return as much of a message as a status can carry: percent-encoded, with the rest of its metadata, 8 KiB."""
    return message.encode("utf-8", "replace")[:_MOST_MESSAGE_BYTES].decode("utf-8", "ignore")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns a raised `HeadraceError` into its status; anything else is a bug and becomes INTERNAL.

    The reason travels in trailing metadata under `headrace-reason`. Cancellation and aborts that a
    handler made itself pass through untouched. Requests are decoded here rather than by grpc, so that bytes which are
    no message are the caller's error, too.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler that serves this call."""
        handler: Any = await continuation(handler_call_details)
        details: Any = handler_call_details
        method: str = details.method
        if handler is None or not method.startswith(_OWN):
            return handler
        decode = _decoder(handler.request_deserializer)
        if handler.unary_unary:

            async def unary(request: bytes, context: Any) -> Any:
                try:
                    return await handler.unary_unary(decode(request), context)
                except Exception as error:  # noqa: BLE001 - the boundary: nothing may leak past it
                    await _abort(context, method, error)

            return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)
        if handler.unary_stream:

            async def stream(request: bytes, context: Any) -> AsyncIterator[Any]:
                try:
                    async for response in handler.unary_stream(decode(request), context):
                        yield response
                except Exception as error:  # noqa: BLE001 - the boundary: nothing may leak past it
                    await _abort(context, method, error)

            return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return handler


def _decoder(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def decode(request: bytes) -> Any:
        if deserialize is None:
            return request
        try:
            return deserialize(request)
        except DecodeError as error:
            raise InvalidRequestError("BAD_REQUEST", f"the request can't be decoded: {error}") from error

    return decode


async def _abort(context: Any, method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, HeadraceError):
        await context.abort(status_code(error), _cut(str(error)), ((REASON_KEY, error.reason),))
    log.error("unhandled error", extra={"method": method}, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error", ((REASON_KEY, "BUG"),))


def raised_from(error: grpc.RpcError) -> HeadraceError:
    """Return the error that the other side raised, or the one that its absence amounts to.

    A status without our reason came from the transport itself: its reason is the code's name.
    """
    code = error.code()
    trailing: Any = error.trailing_metadata() or ()
    metadata: dict[str, str | bytes] = dict(trailing)
    reason = metadata.get(REASON_KEY, code.name)
    reason = reason.decode() if isinstance(reason, bytes) else reason
    return from_status(code, reason, error.details() or code.name)


def answered(response: T | None) -> T:
    """Return a response, if there is one: whatever a call answers goes through here before it is looked at.

    grpc gives None for bytes that are no message of the type, and for a call that ends well without one.

    Raises:
        ProtocolError: PROTOCOL.
    """
    if response is None:
        raise ProtocolError("PROTOCOL", "it answered with bytes that are no message of the protocol")
    return response


class Server:
    """A gRPC server with health, reflection and the error interceptor.

    Health starts as NOT_SERVING; `set_ready` flips it. Event loop only.
    """

    def __init__(self, service_names: Sequence[str], *, interceptors: Sequence[Any] = ()) -> None:
        self.grpc = grpc.aio.server(interceptors=[*interceptors, ErrorInterceptor()], options=_SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._names = [*service_names, ""]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = [*service_names, "grpc.health.v1.Health", reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self.grpc)

    def bind(self, address: str, credentials: grpc.ServerCredentials | None = None) -> str:
        """Bind `host:port` (port 0: the kernel chooses) and return the address with the port.

        Raises:
            StartupError: BIND, the address can't be bound; says which.
        """
        try:
            port = (
                self.grpc.add_secure_port(address, credentials) if credentials else self.grpc.add_insecure_port(address)
            )
        except RuntimeError as error:
            raise StartupError("BIND", f"can't listen on {address}: is it in use?") from error
        return f"{address.rsplit(':', 1)[0]}:{port}"

    async def start(self) -> None:
        """Begin answering; health says NOT_SERVING until `set_ready(True)`."""
        await self.set_ready(False)
        await self.grpc.start()

    async def set_ready(self, is_ready: bool) -> None:
        """Tell health checkers whether this process takes work."""
        status = health_pb2.HealthCheckResponse.SERVING
        if not is_ready:
            status = health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Stop answering; calls under way have `grace_s` seconds, then are cancelled."""
        await self.grpc.stop(grace_s)


def channel(address: str, *, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """Return a channel to `host:port`; every call on it must carry its own timeout or be a stream."""
    if credentials:
        return grpc.aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


def blocking_channel(address: str, *, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """Return a channel for callers without an event loop, with the limits that `channel` has."""
    if credentials:
        return grpc.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
    return grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
