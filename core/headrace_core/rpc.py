"""gRPC in one place: servers with health, reflection and error mapping; channels with sane limits.

The boundary is where calls come in, through the server's door, and where errors become statuses; `raised_from` is where
statuses become errors again.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headrace_core.address import is_loopback
from headrace_core.authority import ServerTls, guard_without_tls
from headrace_core.door import Door
from headrace_core.errors import (
    DeadlineError,
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    LayoutMismatchError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    StartupError,
    TransferCorruptError,
    UnauthenticatedError,
    UnavailableError,
)
from headrace_core.grpc_options import CHANNEL_OPTIONS, MAX_IDLE_MS, SERVER_OPTIONS
from headrace_core.health import HealthServicer
from headrace_core.identity import ChannelTls
from headrace_core.message_parts import has_more_parts

T = TypeVar("T")

log = logging.getLogger(__name__)

REASON_KEY = "headrace-reason"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""gRPC's own word for when to come again; `OverloadedError.retry_after_s` travels in it."""

_REASON = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_PUSHBACK = re.compile(r"[0-9]{1,7}")
_MOST_MESSAGE_BYTES = 2000

MAX_CONNECTIONS = 4096
"""Of one server; half as many as it may open files, if that is less."""

_BY_STATUS: dict[str, type[HeadraceError]] = {
    error.status: error
    for error in (
        InvalidRequestError,
        NotFoundError,
        LayoutMismatchError,
        UnauthenticatedError,
        PermissionDeniedError,
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


class Boundary(grpc.aio.ServerInterceptor):
    """Where a call comes in and its errors become statuses.

    A method that takes one message is served as one that takes a stream of them, which is the same on the wire: so the
    `door` decides before the message is read. Messages are decoded here rather than by grpc, so that bytes which are no
    message are the caller's error, too. A raised `HeadraceError` becomes its status, anything else is a bug and becomes
    INTERNAL; the reason travels in trailing metadata under `headrace-reason`. Cancellation and aborts that a handler
    made itself pass through untouched.
    """

    def __init__(self, door: Door) -> None:
        self._door = door

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler that serves this call."""
        handler: Any = await continuation(handler_call_details)
        details: Any = handler_call_details
        if handler is None:
            return None
        requests = _Requests(self._door, details.method, handler)
        if not handler.response_streaming:
            return grpc.stream_unary_rpc_method_handler(
                _answering(requests, handler.stream_unary or handler.unary_unary), None, handler.response_serializer
            )
        serve = handler.stream_stream or handler.unary_stream
        # One that writes by itself is no generator: three of these in each other were seen in a token's cost.
        stream = _answering if inspect.iscoroutinefunction(serve) else _streaming
        return grpc.stream_stream_rpc_method_handler(stream(requests, serve), None, handler.response_serializer)


class _Requests:
    """What one method's handlers are given, once the door let the call in."""

    def __init__(self, door: Door, method: str, handler: Any) -> None:
        self.method = method
        self._door = door
        self._is_stream: bool = handler.request_streaming
        self._deserialize: Callable[[bytes], Any] | None = handler.request_deserializer

    async def get(self, context: Any) -> Any:
        """Return the call's message, or for a stream an iterator.

        Raises:
            HeadraceError: it is refused.
        """
        if self._is_stream:
            return self._door.enter(self.method, context, self._decode)
        return await self._door.receive(self.method, context, self._decode)

    def _decode(self, message: bytes) -> Any:
        if self._deserialize is None:
            return message
        limit = self._door.max_parts(self.method)
        maker: Any = self._deserialize
        try:
            if limit is not None and has_more_parts(message, maker.__self__.DESCRIPTOR, limit):
                problem = f"the request is made of more than {limit} parts, such as messages of a conversation"
                raise InvalidRequestError("PROMPT_TOO_LONG", problem)
            return self._deserialize(message)
        except DecodeError as error:
            raise InvalidRequestError("BAD_REQUEST", f"the request can't be decoded: {error}") from error


def _answering(requests: _Requests, serve: Any) -> Any:
    async def answer(_: Any, context: Any) -> Any:
        try:
            return await serve(await requests.get(context), context)
        except Exception as error:  # noqa: BLE001 - the boundary: nothing may leak past it
            await _abort(context, requests.method, error)

    return answer


def _streaming(requests: _Requests, serve: Any) -> Any:
    async def stream(_: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in serve(await requests.get(context), context):
                yield response
        except Exception as error:  # noqa: BLE001 - the boundary: nothing may leak past it
            await _abort(context, requests.method, error)

    return stream


async def _abort(context: Any, method: str, error: Exception) -> None:
    try:
        await _send_status(context, method, error)
    except grpc.aio.InternalError as no_call:
        # The call has ended, by the caller or by grpc itself, and nothing can be sent on it any more.
        raise asyncio.CancelledError from no_call


async def _send_status(context: Any, method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, HeadraceError):
        _forget_frames(error)
        trailing = [(REASON_KEY, error.reason)]
        if isinstance(error, OverloadedError) and error.retry_after_s:
            trailing.append((PUSHBACK_KEY, str(round(1000 * error.retry_after_s))))
        await context.abort(status_code(error), _cut(str(error)), tuple(trailing))
    log.error("unhandled error", extra={"method": method}, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error", ((REASON_KEY, "BUG"),))


def _forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of an expected error: grpc keeps it with the call, and its frames keep the message."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # causes and contexts together may go round in a circle
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def raised_from(error: grpc.RpcError) -> HeadraceError:
    """Return the error that the other side raised, or the one that its absence amounts to.

    A status without our reason came from the transport itself: its reason is the code's name.
    """
    trailing: Any = error.trailing_metadata() or ()
    return error_of(error.code(), error.details() or "", dict(trailing))


def error_of(code: grpc.StatusCode, details: str, metadata: Mapping[str, str | bytes]) -> HeadraceError:
    """Return what `raised_from` does, of a status and its metadata."""
    reason = metadata.get(REASON_KEY, code.name)
    reason = reason.decode() if isinstance(reason, bytes) else reason
    raised = from_status(code, reason, details or code.name)
    pushback = metadata.get(PUSHBACK_KEY, "")
    if isinstance(raised, OverloadedError) and isinstance(pushback, str) and _PUSHBACK.fullmatch(pushback):
        raised.retry_after_s = int(pushback) / 1000
    return raised


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
    """A gRPC server with health, reflection and the boundary.

    With `tls` every call is encrypted, and asked who makes it before anything else. Health starts as NOT_SERVING;
    `set_ready` flips it. Event loop only.
    """

    def __init__(
        self,
        service_names: Sequence[str],
        *,
        door: Door | None = None,
        tls: ServerTls | None = None,
        interceptors: Sequence[Any] = (),
        shares_port: bool = False,
    ) -> None:
        """Args: `shares_port`: other processes of this user may bind its port, too, and get some of the connections."""
        options = [
            *SERVER_OPTIONS,
            ("grpc.so_reuseport", int(shares_port)),
            ("grpc.max_allowed_incoming_connections", _max_connections()),
            ("grpc.max_connection_idle_ms", MAX_IDLE_MS),
        ]
        self.door = door or Door()
        self._tls = tls
        self.door.ask_first(tls.guard if tls else guard_without_tls)
        self.grpc = grpc.aio.server(interceptors=[*interceptors, Boundary(self.door)], options=options)
        self._health = HealthServicer(service_names)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = [*service_names, "grpc.health.v1.Health", reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self.grpc)

    def bind(self, address: str) -> str:
        """Bind `host:port` (port 0: the kernel chooses) and return the address with the port.

        Warns if others than this machine can reach it, and nothing is encrypted.

        Raises:
            StartupError: BIND, the address can't be bound; says which.
        """
        if not self._tls and not is_loopback(address):
            log.warning(
                "anybody who reaches this address may call, in clear text; set --tls", extra={"listen": address}
            )
        try:
            if self._tls:
                port = self.grpc.add_secure_port(address, self._tls.files.server_credentials())
            else:
                port = self.grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise StartupError("BIND", f"can't listen on {address}: is it in use?") from error
        return f"{address.rsplit(':', 1)[0]}:{port}"

    async def start(self) -> None:
        """Begin answering; health says NOT_SERVING until `set_ready(True)`."""
        await self.set_ready(False)
        await self.grpc.start()

    async def set_ready(self, is_ready: bool) -> None:
        """Tell health checkers whether this process takes work."""
        self._health.set_ready(is_ready)

    async def stop(self, grace_s: float) -> None:
        """Stop answering; calls under way have `grace_s` seconds, then are cancelled."""
        await self.grpc.stop(grace_s)


def _max_connections() -> int:
    """Return how many callers may be connected: never so many that no file can be opened any more."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, files // 2)


Connect = Callable[[str], grpc.aio.Channel]


def channel(address: str, *, tls: ChannelTls | None = None, by_proxy: bool = False) -> grpc.aio.Channel:
    """Return a channel to `host:port`; every call on it must carry its own timeout or be a stream.

    With `by_proxy` it goes as the environment says (`https_proxy`, `http_proxy`, `no_proxy`), unless to this machine.
    """
    return _open(address, tls, _channel_options(address, tls, by_proxy=by_proxy))


def own_channel(address: str, *, tls: ChannelTls | None = None) -> grpc.aio.Channel:
    """Return a channel to `host:port` with a connection of its own: others to the same address share one."""
    return _open(address, tls, [*_channel_options(address, tls), ("grpc.use_local_subchannel_pool", 1)])


def _open(address: str, tls: ChannelTls | None, options: list[tuple[str, Any]]) -> grpc.aio.Channel:
    if tls:
        return grpc.aio.secure_channel(address, tls.credentials, options=options)
    return grpc.aio.insecure_channel(address, options=options)


def blocking_channel(address: str, *, tls: ChannelTls | None = None, by_proxy: bool = False) -> grpc.Channel:
    """Return a channel for callers without an event loop; else as `channel`."""
    options = _channel_options(address, tls, by_proxy=by_proxy)
    if tls:
        return grpc.secure_channel(address, tls.credentials, options=options)
    return grpc.insecure_channel(address, options=options)


def _channel_options(address: str, tls: ChannelTls | None, *, by_proxy: bool = False) -> list[tuple[str, Any]]:
    # By itself gRPC takes whatever proxy the environment names, also to this machine and between our processes.
    has_proxy = by_proxy and not is_loopback(address)
    options: list[tuple[str, Any]] = [*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", int(has_proxy))]
    if tls is not None and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options
