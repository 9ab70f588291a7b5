"""One HTTP request and its answer. To the server's door it is what a call of gRPC is, so the same limits hold.

The body stays at the client's side, but for what came with the head, until `read` asks for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, Protocol

import grpc.aio

from headrace_router.face.http.errors import Headers, HttpError

MAX_BODY_BYTES = 8 << 20
"""Of one request; as large as the largest message of gRPC."""

JSON = "application/json"
_LAST_CHUNK = b"0\r\n\r\n"
_REASONS = {status.value: status.phrase for status in HTTPStatus}


class Wire(Protocol):
    """What an exchange needs of its connection."""

    peer: str
    """As gRPC writes it, `ipv4:127.0.0.1:5000`."""
    uris: Sequence[bytes]
    """Whom the client's certificate names."""
    is_blocked: bool
    """True while the client reads so slowly that nothing more should be written."""

    def read_on(self) -> None:
        """Let the client send more."""
        ...

    def write(self, data: bytes) -> None:
        """Send bytes; nothing happens when the connection is gone."""
        ...


class Exchange:
    """Event loop only."""

    def __init__(self, wire: Wire, method: str, target: str, headers: Headers, *, is_http_1_0: bool) -> None:
        self.method = method
        self.path, _, self.query = target.partition("?")
        self.headers = dict(headers)
        """By name in lower case; of those sent twice the last."""
        self.keeps_alive = True
        """Whether the connection may have another exchange after this one."""
        self.is_received = False
        """True when the whole body has come."""
        self.has_begun = False
        """True when the head of the answer was sent."""
        self.is_answered = False
        """True when all of the answer was sent."""
        self.extra: Headers = []
        """Headers for every answer."""
        self.on_writable: Callable[[], None] | None = None
        """Called when the client reads again."""
        self.on_stalled: Callable[[], None] | None = None
        """Called when the client does not; None: the connection ends."""
        self.wire = wire
        self._is_http_1_0 = is_http_1_0
        self._body: list[bytes] = []
        self._num_bytes = 0
        self._problem: HttpError | None = None
        self._is_read = False
        self._more: asyncio.Future[None] | None = None
        self._callbacks: list[Callable[[Any], Any]] = []

    # What the door takes for a context of grpc.

    def peer(self) -> str:
        """Return where the request comes from."""
        return self.wire.peer

    def auth_context(self) -> dict[str, Sequence[bytes]]:
        """Return whom the client's certificate names, as grpc says it."""
        return {"peer_spiffe_id": self.wire.uris} if self.wire.uris else {}

    def invocation_metadata(self) -> list[tuple[str, str]]:
        """Return the headers."""
        return list(self.headers.items())

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        """Call `callback` with this exchange when it is over."""
        self._callbacks.append(callback)

    async def read(self) -> Any:
        """Return the whole body, which is not kept; `EOF` the second time, as a call has one message.

        Raises:
            HttpError: 413, it is too large; 400, it is none.
        """
        if self._is_read:
            return grpc.aio.EOF
        self._is_read = True
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > MAX_BODY_BYTES:
            self.spoil(_too_large())
        if not self.is_received and self._problem is None:
            if self.headers.get("expect", "").lower() == "100-continue" and not self._is_http_1_0:
                self.wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wire.read_on()
            self._more = asyncio.get_running_loop().create_future()
            await self._more
        if self._problem is not None:
            raise self._problem
        body, self._body = b"".join(self._body), []
        return body

    def read_now(self) -> bytes | None:
        """Return the whole body, as `read` does, if it has come and nobody has read it; None: it must be waited for."""
        if not self.is_received or self._is_read or self._problem is not None:
            return None
        self._is_read = True
        body, self._body = b"".join(self._body), []
        return body

    # What the connection tells.

    def on_body(self, data: bytes) -> None:
        """Take a part of the body."""
        self._num_bytes += len(data)
        if self._num_bytes > MAX_BODY_BYTES:
            self.spoil(_too_large())
        else:
            self._body.append(data)

    def on_received(self) -> None:
        """Take note that the body is complete."""
        self.is_received = True
        self._wake()

    def spoil(self, problem: HttpError) -> None:
        """Take note that no body comes that could be taken."""
        self._problem = self._problem or problem
        self.keeps_alive = False
        self._body.clear()
        self._wake()

    def end(self) -> None:
        """Tell everybody that it is over; once."""
        for callback in self._callbacks:
            callback(self)

    # The answer.

    @property
    def is_blocked(self) -> bool:
        """True while the client reads so slowly that nothing more should be written."""
        return self.wire.is_blocked

    def answer(
        self,
        body: str | bytes,
        *,
        status: int = HTTPStatus.OK,
        content_type: str = JSON,
        headers: Headers | None = None,
    ) -> None:
        """Answer with one whole body."""
        content = body.encode() if isinstance(body, str) else body
        named = [("content-type", content_type), ("content-length", str(len(content))), *(headers or [])]
        if not self.is_received:
            self.keeps_alive = False
        self.has_begun = self.is_answered = True
        self.wire.write(self._head(status, named) + (b"" if self.method == "HEAD" else content))

    def begin_stream(self, text: str = "") -> None:
        """Begin an answer of server-sent events, the first of which are `text`: ASCII; empty: they follow."""
        named = [("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache")]
        if self._is_http_1_0:
            self.keeps_alive = False  # its end is the connection's
        else:
            named.append(("transfer-encoding", "chunked"))
        self.has_begun = True
        self.wire.write(self._head(HTTPStatus.OK, named) + (self._chunk(text) if text else b""))

    def send(self, text: str) -> None:
        """Send more of a stream: ASCII, not empty."""
        self.wire.write((text if self._is_http_1_0 else f"{len(text):x}\r\n{text}\r\n").encode())

    def end_stream(self, text: str) -> None:
        """Send the last of a stream: ASCII, not empty."""
        self.is_answered = True
        self.wire.write(self._chunk(text) + (b"" if self._is_http_1_0 else _LAST_CHUNK))

    def _chunk(self, text: str) -> bytes:
        return (text if self._is_http_1_0 else f"{len(text):x}\r\n{text}\r\n").encode("ascii")

    def _head(self, status: int, headers: Headers) -> bytes:
        lines = [f"HTTP/1.1 {int(status)} {_REASONS.get(int(status), '')}"]
        lines += [f"{name}: {value}" for name, value in (*headers, *self.extra)]
        if not self.keeps_alive:
            lines.append("connection: close")
        elif self._is_http_1_0:
            lines.append("connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def _wake(self) -> None:
        more, self._more = self._more, None
        if more is not None and not more.done():
            more.set_result(None)


def _too_large() -> HttpError:
    problem = f"the request's body has more than the {MAX_BODY_BYTES} bytes that are taken"
    return HttpError(problem, http_status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
