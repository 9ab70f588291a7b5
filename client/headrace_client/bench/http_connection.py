"""One connection that speaks HTTP/1.1: an answer at a time, its body as it comes. llhttp parses, as in the router."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any

import httptools
from headrace_core.errors import HeadraceError, ProtocolError, UnavailableError

OnBody = Callable[[int, bytes], None]
"""Told an answer's status and more of its body."""


class HttpConnection(asyncio.Protocol):
    """Event loop only. Usable again after `exchange` while `is_open`."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: Any = None
        self._parser: Any = None
        self._on_body: OnBody | None = None
        self._done: asyncio.Future[int] | None = None

    async def exchange(self, request: bytes, on_body: OnBody) -> int:
        """Send a request, and return its answer's status when all of it has come.

        Raises:
            UnavailableError: CONNECTION_LOST.
            ProtocolError: PROTOCOL, it is no HTTP.
            HeadraceError: `on_body` raised it.
        """
        self._on_body = on_body
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._done
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """Disconnect."""
        self.is_open = False
        self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport, self.is_open = transport, True
        wire = transport.get_extra_info("socket")
        if wire is not None:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._done is None or self._done.done():  # nobody asked
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            told = error.__context__  # by who reads the body
            if not isinstance(told, HeadraceError):
                told = ProtocolError("PROTOCOL", f"the server's answer is no HTTP: {error}")
            self._fail(told)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self.is_open = False
        self._fail(UnavailableError("CONNECTION_LOST", "the server closed the connection before its answer's end"))

    # What the parser calls.

    def on_body(self, body: bytes) -> None:
        """Take more of the body."""
        assert self._on_body is not None, "an answer is due"
        self._on_body(self._parser.get_status_code(), body)

    def on_message_complete(self) -> None:
        """The answer is complete."""
        status: int = self._parser.get_status_code()
        if status < 200:  # another one follows
            return
        if not self._parser.should_keep_alive():
            self.close()
        if self._done is not None and not self._done.done():
            self._done.set_result(status)

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        if self.is_open:
            self.close()


async def connect(host: str, port: int, tls: ssl.SSLContext | None, timeout_s: float) -> HttpConnection:
    """Return a new connection.

    Raises:
        UnavailableError: UNREACHABLE.
    """
    try:
        async with asyncio.timeout(timeout_s):
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(
                HttpConnection, host, port, ssl=tls, server_hostname=host if tls else None
            )
    except (OSError, TimeoutError) as error:
        raise UnavailableError(
            "UNREACHABLE", f"no connection to {host}:{port}: {error or 'it takes too long'}"
        ) from None
    return connection
