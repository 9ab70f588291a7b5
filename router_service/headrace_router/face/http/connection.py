"""One client's HTTP/1.1 connection: requests in order, one answered at a time.

    HEAD ──a whole head──► ANSWERING ──answered──► HEAD | LINGERING | CLOSED
      └── too slow, too large, no HTTP ──► LINGERING ──the client closes, or 2 s──► CLOSED

What it may cost is bounded: a head in bytes and seconds, a body by the door, requests sent ahead in number, what was
written and not read by the transport's buffer, and a client that reads nothing in seconds. While an answer is made the
client may send nothing but its next requests; a connection that ends cancels the request under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any

import httptools

from headrace_router.face.http.connections import Connections
from headrace_router.face.http.errors import Headers, HttpError, body_of
from headrace_router.face.http.exchange import MAX_BODY_BYTES, Exchange

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 << 10
"""Of a request line and its headers."""
_MAX_HEADERS = 100
HEAD_TIMEOUT_S = 10.0
"""How long a head may take to arrive, and a new connection to begin with one."""
IDLE_TIMEOUT_S = 75.0
"""How long a connection may wait between two requests."""
_MAX_RAW_BODY_BYTES = 3 * MAX_BODY_BYTES
"""Of a body as it comes, with what is around its chunks."""
_MAX_AHEAD = 16
"""Requests that a client may send before their turn."""
_MAX_UNREAD_BYTES = 64 << 10
"""Written to a client and not taken by it yet, past which nothing more is written."""
STALL_TIMEOUT_S = 10.0
"""How long a client that has so much to read may take none of it."""
_LINGER_S = 2.0
_CLOSE_S = 5.0
"""How long the last of what was written may take to leave."""

App = Callable[[Exchange], Awaitable[None]]
"""Answers an exchange; raises nothing but `CancelledError`."""


class Connection(asyncio.Protocol):
    """Event loop only."""

    def __init__(self, app: App, connections: Connections) -> None:
        self.peer = "unknown"
        self.uris: Sequence[bytes] = ()
        self.is_blocked = False
        self._app = app
        self._connections = connections
        self._transport: Any = None
        self._parser = httptools.HttpRequestParser(self)
        self._is_in_head = True
        self._head_bytes = 0
        self._body_bytes = 0
        self._target = b""
        self._headers: Headers = []
        self._field_bytes = 0
        self._arriving: Exchange | None = None
        """Whose body is coming."""
        self._ahead: deque[Exchange] = deque()
        self._current: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._problem: HttpError | None = None
        self._is_closing = False
        self._is_deaf = False
        """True when nothing more is taken, but what has come is answered."""
        self._timer: asyncio.TimerHandle | None = None
        self._due: tuple[float, Callable[[], None]] | None = None
        """When what is to happen if nothing else does; the timer may go off earlier, and is set again."""
        self._loop = asyncio.get_running_loop()
        self._stall: asyncio.TimerHandle | None = None
        self._unread_bytes = 0

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        """Take the connection, if there is room."""
        self._transport = transport
        self.peer, self.uris = _peer_of(transport)
        transport.set_write_buffer_limits(high=_MAX_UNREAD_BYTES)
        raw = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self._connections.add(self):
            error = HttpError("too many connections; try again later", http_status=HTTPStatus.SERVICE_UNAVAILABLE)
            self._refuse(error)
        else:
            self._connections.set_idle(self, True)
            self._set_timer(HEAD_TIMEOUT_S, self._on_head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel what is under way."""
        del exc
        self._is_closing = True
        self._connections.remove(self)
        for timer in (self._timer, self._stall):
            if timer is not None:
                timer.cancel()
        if self._task is not None:
            self._task.cancel()
        self._ahead.clear()

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        if self._is_closing or self._is_deaf:
            return  # read, so that a client that still sends can read our answer, and dropped
        begins = self._current is None and not self._head_bytes
        if begins:
            self._connections.set_idle(self, False)
        if self._is_in_head:
            self._head_bytes += len(data)
        else:
            self._body_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Another protocol is none of ours: answered as if it was not asked for, and then it is over.
            self._is_deaf = True
            last = self._ahead[-1] if self._ahead else self._current
            if last is not None:
                last.keeps_alive = False
            return
        except httptools.HttpParserError as error:
            self._fail(self._problem or HttpError(f"this is no HTTP/1.1: {error}"))
            return
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(_too_large_head())
        elif not self._is_in_head and self._body_bytes > _MAX_RAW_BODY_BYTES:
            self._fail(HttpError("the request's chunks are mostly no body"))
        elif begins and self._is_in_head and self._current is None:  # a head that came whole needs no timer
            self._set_timer(HEAD_TIMEOUT_S, self._on_head_timeout)

    def eof_received(self) -> bool:
        """Take an end of what the client sends for its end: nobody answers into half a connection."""
        return False

    def pause_writing(self) -> None:
        """Write nothing more until the client has read."""
        self.is_blocked = True
        self._unread_bytes = self._transport.get_write_buffer_size()
        self._stall = asyncio.get_running_loop().call_later(STALL_TIMEOUT_S, self._on_stall)

    def resume_writing(self) -> None:
        """Go on writing."""
        self.is_blocked = False
        if self._stall is not None:
            self._stall.cancel()
        if self._current is not None and self._current.on_writable is not None:
            self._current.on_writable()

    # httptools, from within feed_data

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._target, self._headers, self._field_bytes = b"", [], 0

    def on_url(self, url: bytes) -> None:
        """Take its target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self._headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))
        self._field_bytes += len(name) + len(value)
        if len(self._headers) > _MAX_HEADERS or self._field_bytes + len(self._target) > MAX_HEAD_BYTES:
            self._problem = _too_large_head()
            raise self._problem

    def on_headers_complete(self) -> None:
        """Answer the request, or queue it."""
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1") or len(self._target) > MAX_HEAD_BYTES:
            self._problem = HttpError(f"HTTP/{version} is not spoken here, or the target is too long")
            raise self._problem
        if len(self._ahead) >= _MAX_AHEAD:
            self._problem = HttpError(f"more than {_MAX_AHEAD} requests were sent ahead; wait for answers")
            raise self._problem
        method = self._parser.get_method().decode("latin-1")
        exchange = Exchange(self, method, self._target.decode("latin-1"), self._headers, is_http_1_0=version == "1.0")
        exchange.keeps_alive = self._parser.should_keep_alive() and not self._connections.is_draining
        self._arriving = exchange
        self._is_in_head, self._head_bytes, self._body_bytes = False, 0, 0
        if self._current is None:
            self._begin(exchange)
        else:
            self._ahead.append(exchange)
        self._stop_reading()  # the door says when its body is read

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        if self._arriving is not None:
            self._arriving.on_body(body)

    def on_message_complete(self) -> None:
        """Take note that the request is complete."""
        arriving, self._arriving = self._arriving, None
        self._is_in_head = True
        if arriving is not None:
            arriving.on_received()
        if not self._ahead:
            self.read_on()  # to hear if the client leaves

    # Wire

    def read_on(self) -> None:
        """Let the client send more."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def write(self, data: bytes) -> None:
        """Send bytes; nothing happens when the connection is gone."""
        if not self._transport.is_closing():
            self._transport.write(data)

    # The life of an exchange

    @property
    def is_idle(self) -> bool:
        """True if no request is under way or arriving."""
        return self._current is None

    def close(self) -> None:
        """End when what was written has left, or after a while."""
        self._is_closing = True
        if not self._transport.is_closing():
            self._transport.close()
        self._set_timer(_CLOSE_S, self._transport.abort)

    def abort(self) -> None:
        """End at once."""
        self._transport.abort()

    def stop_keeping_alive(self) -> None:
        """Close now if idle, else after the request under way."""
        if self._current is None:
            self.close()
        else:
            self._current.keeps_alive = False

    def _begin(self, exchange: Exchange) -> None:
        self._current, self._due = exchange, None
        self._task = self._loop.create_task(self._run(exchange))

    async def _run(self, exchange: Exchange) -> None:
        try:
            await self._app(exchange)
        except Exception as error:
            log.error("unhandled error", extra={"path": exchange.path[:80]}, exc_info=error)
        finally:
            exchange.end()
            self._on_over(exchange)

    def _on_over(self, exchange: Exchange) -> None:
        self._current = self._task = None
        if self._transport.is_closing():
            return
        if not exchange.is_answered:
            self.abort()
        elif not exchange.is_received:
            self._linger()
        elif not exchange.keeps_alive:
            self.close()
        elif self._ahead:
            self._begin(self._ahead.popleft())
            if not self._ahead and self._arriving is None:
                self.read_on()
        elif self._problem is not None:
            self._refuse(self._problem)
        else:
            self.read_on()
            if self._head_bytes:
                self._set_timer(HEAD_TIMEOUT_S, self._on_head_timeout)
            else:
                self._connections.set_idle(self, True)
                self._set_timer(IDLE_TIMEOUT_S, self._on_head_timeout)

    def _fail(self, error: HttpError) -> None:
        """Refuse what came, after the answers to what came before it."""
        self._problem, self._is_deaf = error, True
        if self._arriving is not None:
            self._arriving.spoil(error)
        elif self._current is None:
            self._refuse(error)

    def _refuse(self, error: HttpError) -> None:
        refused = Exchange(self, "GET", "", [], is_http_1_0=False)
        refused.answer(body_of(error), status=error.http_status)
        self._linger()

    def _linger(self) -> None:
        """Read on for a moment: closing on a client that still sends would take our answer from it."""
        self._is_closing = True
        self.read_on()
        self._set_timer(_LINGER_S, self.close)

    def _stop_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def _set_timer(self, after_s: float, callback: Callable[[], None]) -> None:
        due_s = self._loop.time() + after_s
        self._due = due_s, callback
        # Requests that follow each other put it off again and again: a timer that goes off too early costs less.
        if self._timer is None or self._timer.when() > due_s:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(due_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._due is None:
            return
        due_s, callback = self._due
        if due_s > self._loop.time():
            self._timer = self._loop.call_at(due_s, self._on_timer)
        else:
            self._due = None
            callback()

    def _on_head_timeout(self) -> None:
        if self._current is not None:
            return
        if self._head_bytes:
            self._refuse(HttpError("the request's head took too long", http_status=HTTPStatus.REQUEST_TIMEOUT))
        else:
            self.close()

    def _on_stall(self) -> None:
        unread_bytes = self._transport.get_write_buffer_size()
        if unread_bytes < self._unread_bytes:  # slow, but it reads
            self._unread_bytes = unread_bytes
            self._stall = asyncio.get_running_loop().call_later(STALL_TIMEOUT_S, self._on_stall)
        elif self._current is not None and self._current.on_stalled is not None:
            self._current.on_stalled()
        else:
            self.abort()


def _too_large_head() -> HttpError:
    problem = f"the request's line and headers are larger than {MAX_HEAD_BYTES} bytes, or more than {_MAX_HEADERS}"
    return HttpError(problem, http_status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)


def _peer_of(transport: Any) -> tuple[str, Sequence[bytes]]:
    """Return where a connection comes from, as gRPC writes it, and whom its certificate names."""
    name = transport.get_extra_info("peername")
    peer = "unknown"
    if name:
        peer = f"ipv6:[{name[0]}]:{name[1]}" if ":" in name[0] else f"ipv4:{name[0]}:{name[1]}"
    certificate: dict[str, Any] = transport.get_extra_info("peercert") or {}
    uris = [value.encode() for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    return peer, uris
