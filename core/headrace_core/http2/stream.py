"""One stream of an HTTP/2 connection: what may be sent and come of it, and whose it is."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from headrace_core.http2 import frames
from headrace_core.http2.frames import frame
from headrace_core.http2.hpack import Fields

if TYPE_CHECKING:
    from headrace_core.http2.connection import Connection


class Owner(Protocol):
    """Whose stream it is. Called on the event loop, in the turn in which the bytes came."""

    def on_fields(self, fields: Fields, *, ends: bool) -> None:
        """Header fields came, or trailers; with `ends` the other end sends no more."""
        ...

    def on_data(self, data: bytes, *, ends: bool) -> None:
        """Bytes came; `Stream.used` gives their place in the window back."""
        ...

    def on_over(self, code: int | None, problem: str) -> None:
        """The other end, or the connection's, ended the stream; nothing can be sent or will come. Once.

        `code` is HTTP/2's; None: the connection is gone.
        """
        ...

    def on_writable(self) -> None:
        """All that was to be sent has left."""
        ...


class Stream:
    """One stream of a connection."""

    __slots__ = ("_used", "connection", "is_over", "num_unsent", "number", "owner", "room", "unsent", "window")

    def __init__(self, connection: Connection, number: int, owner: Owner, *, window: int, room: int) -> None:
        self.connection = connection
        self.number = number
        self.owner = owner
        self.window = window
        """Bytes that may be sent."""
        self.room = room
        """Bytes that may come."""
        self.unsent: deque[tuple[memoryview, int]] = deque()
        """What the window held back, with flags."""
        self.num_unsent = 0
        """Bytes of it."""
        self.is_over = False
        self._used = 0

    def send_fields(self, block: bytes, *, ends: bool = False) -> None:
        """Send encoded header fields."""
        flags = frames.END_HEADERS | (frames.END_STREAM if ends else 0)
        self.connection.send(frame(frames.HEADERS, flags, self.number, block))

    def send(self, data: bytes, *, ends: bool = False) -> None:
        """Send bytes, as far as the windows let them go; the rest follows by itself."""
        connection, size = self.connection, len(data)
        flags = frames.END_STREAM if ends else 0
        if self.unsent or size > self.window or size > connection.window or size > frames.FRAME_BYTES:
            self.unsent.append((memoryview(data), flags))
            self.num_unsent += size
            connection.push(self)
        else:
            self.window -= size
            connection.window -= size
            connection.send(frames.HEAD.pack(size >> 8, size & 0xFF, frames.DATA, flags, self.number) + data)

    def used(self, num_bytes: int, least: int = 1) -> None:
        """Let so many bytes more come, told when it is `least` of them together."""
        self._used += num_bytes
        if self._used >= least and not self.is_over:
            self.room += self._used
            self.connection.send(frame(frames.WINDOW_UPDATE, 0, self.number, frames.NUMBER.pack(self._used)))
            self._used = 0

    def reset(self, code: int = frames.CANCEL) -> None:
        """End it for both sides, at once; its owner hears nothing. Idempotent."""
        if not self.is_over:
            self.connection.forget(self)
            self.connection.send(frame(frames.RST_STREAM, 0, self.number, frames.NUMBER.pack(code)))
