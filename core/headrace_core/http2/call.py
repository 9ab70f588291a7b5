"""A call of gRPC with messages both ways, on a connection of its own, spoken without gRPC's library (`connection.py`).

    OPEN ── trailers, a reset, the connection's end, bytes that are none of HTTP/2's, `close` ──► ENDED

A message is given to its taker in the turn of the loop in which it came, and leaves in the turn in which it is sent.
How the call ended is what gRPC's library would have said: `rpc.raised_from`.
"""

from __future__ import annotations

import asyncio
import ssl
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from headrace_core import __version__
from headrace_core.address import parse_address
from headrace_core.errors import HeadraceError, ProtocolError
from headrace_core.grpc_options import MAX_MESSAGE_BYTES
from headrace_core.http2 import frames
from headrace_core.http2.connection import Connection
from headrace_core.http2.frames import Http2Error
from headrace_core.http2.hpack import Fields, encode
from headrace_core.http2.messages import Messages, prefixed
from headrace_core.identity import CallTls
from headrace_core.rpc import error_of, from_status

_STREAM = 1
"""The first stream that a client opens."""
_WINDOW_BYTES = 1 << 20
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_BY_HTTP = {
    400: grpc.StatusCode.INTERNAL,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.UNIMPLEMENTED,
    429: grpc.StatusCode.UNAVAILABLE,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.UNAVAILABLE,
}
"""What an answer that is not gRPC's stands for. Source: grpc, doc/http-grpc-status-mapping.md."""
_BY_RESET = {
    frames.REFUSED_STREAM: grpc.StatusCode.UNAVAILABLE,
    frames.CANCEL: grpc.StatusCode.CANCELLED,
    frames.ENHANCE_YOUR_CALM: grpc.StatusCode.RESOURCE_EXHAUSTED,
    frames.INADEQUATE_SECURITY: grpc.StatusCode.PERMISSION_DENIED,
}
"""What a stream that was reset stands for; what is not here is INTERNAL. Source: grpc, doc/PROTOCOL-HTTP2.md."""

OnMessage = Callable[[bytes], None]
"""Takes a message; what it raises ends the call, and is how it ended."""
Dial = Callable[[str, str, OnMessage], Awaitable["Call"]]
"""Opens a call: an address, a method's full name, who takes its messages."""


class Call(Connection):
    """Event loop only; `close` must follow."""

    def __init__(self, method: str, authority: str, scheme: str, on_message: OnMessage) -> None:
        super().__init__(stream_window=_WINDOW_BYTES)
        self.ended: asyncio.Future[HeadraceError | None] = asyncio.get_running_loop().create_future()
        """How it ended; None: well."""
        self._about = method, authority, scheme
        self._on_message = on_message
        self._messages = Messages(MAX_MESSAGE_BYTES)
        self._has_head = False
        self._stream = self.open(_STREAM, self)

    def connection_made(self, transport: Any) -> None:
        """Ask for the call."""
        method, authority, scheme = (each.encode() for each in self._about)
        transport.write(frames.PREFACE)
        super().connection_made(transport)
        fields = [
            (b":method", b"POST"),
            (b":scheme", scheme),
            (b":path", method),
            (b":authority", authority),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", f"headrace/{__version__}".encode()),
        ]
        self._stream.send_fields(encode(fields))

    def say(self, message: bytes) -> None:
        """Send a message; nothing happens when the call is over."""
        if not self._stream.is_over:
            self._stream.send(prefixed(message))
            self._check_read()

    def end(self, error: HeadraceError | None) -> None:
        """End it with `error`, if it has not ended."""
        self._settle(error)
        self.close()

    def close(self) -> None:
        """End it, if it has not ended. Idempotent."""
        self._stream.reset()
        self.hang_up()
        self._settle(None)

    def is_known(self, number: int) -> bool:
        """See `Connection`."""
        return number == _STREAM

    # stream.Owner

    def on_fields(self, fields: Fields, *, ends: bool) -> None:
        """Take the head of the answer, or how it ended."""
        found = dict(fields)
        if not self._has_head:
            status = found.get(b":status", b"")
            if status.startswith(b"1"):
                return  # another head follows
            self._has_head = True
            if status != b"200" and b"grpc-status" not in found:
                number = int(status) if status.isdigit() and len(status) == 3 else 0
                code = _BY_HTTP.get(number, grpc.StatusCode.UNKNOWN)
                self.end(from_status(code, "", f"it answered with status {number} of HTTP"))
                return
        if ends:
            self.end(_error_of(found))

    def on_data(self, data: bytes, *, ends: bool) -> None:
        """Take messages."""
        self._stream.used(len(data), least=_WINDOW_BYTES // 2)
        try:
            for message in self._messages.feed(data):
                self._on_message(message)
                if self._stream.is_over:
                    return
        except HeadraceError as error:
            self.end(error)
        except ValueError as error:
            self.end(ProtocolError("PROTOCOL", f"it sent {error}"))
        if ends:
            self.end(_unavailable("the call ended without a status"))

    def on_over(self, code: int | None, problem: str) -> None:
        """The stream is gone."""
        if self.is_broken:
            self._settle(ProtocolError("PROTOCOL", f"it sent {problem}"))
        else:
            status = grpc.StatusCode.UNAVAILABLE if code is None else _BY_RESET.get(code, grpc.StatusCode.INTERNAL)
            self._settle(from_status(status, "", problem))

    def on_writable(self) -> None:
        """What was said has left: nobody waits for that."""

    def _check_read(self) -> None:
        try:
            self.check_read()
        except Http2Error as error:
            self.fail(error.code, str(error))

    def _settle(self, error: HeadraceError | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)


async def open_call(address: str, method: str, on_message: OnMessage, *, tls: CallTls | None = None) -> Call:
    """Connect and begin a call; that it is refused is heard by `Call.ended`.

    Args:
        address: `host:port`.
        method: its full name, `/headrace.v1.DecodeService/Session`.
        on_message: takes what comes.
        tls: with whose certificate, and whom to expect; None: in clear text.

    Raises:
        UnavailableError: nobody is there, or nobody who proves to be who was expected.
    """
    to = parse_address(address)
    call: Call | None = None

    def make() -> Call:
        nonlocal call
        call = Call(method, tls.server_name if tls else address, "https" if tls else "http", on_message)
        return call

    try:
        transport, _ = await asyncio.get_running_loop().create_connection(
            make,
            to.host,
            to.port,
            ssl=tls.context if tls else None,
            server_hostname=tls.server_name if tls else None,
        )
    except (OSError, ssl.SSLError) as error:
        raise _unavailable(f"failed to connect to {address}: {error}") from error
    assert call is not None, "it was made"
    used: Any = transport.get_extra_info("ssl_object")
    if used is not None and used.selected_alpn_protocol() != "h2":
        call.close()
        raise _unavailable(f"{address} does not speak HTTP/2")
    return call


def _unavailable(problem: str) -> HeadraceError:
    return from_status(grpc.StatusCode.UNAVAILABLE, "", problem)


def _error_of(trailers: dict[bytes, bytes]) -> HeadraceError | None:
    status = trailers.get(b"grpc-status", b"")
    code = _CODES.get(int(status), grpc.StatusCode.UNKNOWN) if status.isdigit() and len(status) < 3 else None
    if code is grpc.StatusCode.OK:
        return None
    details = urllib.parse.unquote(trailers.get(b"grpc-message", b"").decode("latin-1"))
    metadata = {name.decode("latin-1"): value.decode("latin-1") for name, value in trailers.items()}
    return error_of(code or grpc.StatusCode.UNKNOWN, details, metadata)
