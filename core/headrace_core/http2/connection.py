"""One end of an HTTP/2 connection: frames in and out, windows both ways; what its streams mean is their owner's.

gRPC's own library costs a router some 150 µs for each message of a call (threads, a poller, a task switch). Calls that
carry what every token passes through are spoken here, in the very turn of the loop that brought their bytes: the same
protocol, so the other end may use whatever library it likes.

Bounded whatever the other end does: a frame, a block of header fields, frames that carry nothing in a second, what
waits to leave. Of DATA each stream takes its window and no more, until its owner says that it was used.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from headrace_core.errors import ProtocolError
from headrace_core.http2 import frames
from headrace_core.http2.frames import Http2Error, frame
from headrace_core.http2.hpack import Decoder, Fields
from headrace_core.http2.stream import Owner, Stream
from headrace_core.pace import Pace

_WINDOW_BYTES = 1 << 20
"""Of the whole connection, to receive."""
_MOST_FIELD_BYTES = 8 << 10
"""Of one block's fields; as much as gRPC's library is told to take (`rpc.MAX_METADATA_BYTES`)."""
_MOST_UNREAD_BYTES = 64 << 20
"""Of what the other end does not read or let us send. More than an honest end that is held up for a while has to wait
for: prompts of many requests, with answers to its pings among them."""
_CONTROL_PER_S, _CONTROL_AT_ONCE = 10_000.0, 20_000.0
"""Frames that carry nothing: an honest end updates a window for some data of ours, or answers a ping."""


class Connection(asyncio.Protocol):
    """What a client's end and a server's have in common. Event loop only."""

    def __init__(self, *, stream_window: int) -> None:
        """Args: `stream_window` bytes may come of a stream that nobody has used."""
        self.transport: Any = None
        self.window = frames.DEFAULT_WINDOW_BYTES
        """Bytes that may be sent, of all streams."""
        self.streams: dict[int, Stream] = {}
        self.is_broken = False
        """True if it ended because the other end did what may not be."""
        self.is_blocked = False
        """True while the other end takes so little that nothing more should be sent."""
        self._stream_window = stream_window
        self._peer_window = frames.DEFAULT_WINDOW_BYTES
        """Of a new stream, to send."""
        self._rest = b""
        self._num_unacknowledged = 0
        self._decoder = Decoder(_MOST_FIELD_BYTES)
        self._block: tuple[int, int, bytearray] | None = None
        """Stream, flags and what has come of a block of fields."""
        self._held: dict[Stream, None] = {}
        """Streams with something unsent."""
        self._pace = Pace("frames that carry nothing", per_s=_CONTROL_PER_S, burst=_CONTROL_AT_ONCE)

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        """Begin: our settings, and a window for the whole connection."""
        self.transport = transport
        raw = transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        settings = {
            frames.ENABLE_PUSH: 0,
            frames.INITIAL_WINDOW_SIZE: self._stream_window,
            frames.MAX_HEADER_LIST_SIZE: _MOST_FIELD_BYTES,
        }
        payload = b"".join(frames.SETTING.pack(*each) for each in settings.items())
        grown = frames.NUMBER.pack(_WINDOW_BYTES - frames.DEFAULT_WINDOW_BYTES)
        self.send(frame(frames.SETTINGS, 0, 0, payload) + frame(frames.WINDOW_UPDATE, 0, 0, grown))

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        if self.transport.is_closing():
            return
        try:
            self._take(self._rest + data if self._rest else data)
        except Http2Error as error:
            self.fail(error.code, str(error))
        except ProtocolError as error:
            self.fail(frames.ENHANCE_YOUR_CALM, str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every stream's owner."""
        self._end(None, f"the connection was lost{f': {exc}' if exc else ''}")

    def pause_writing(self) -> None:
        """Too much waits to leave."""
        self.is_blocked = True

    def resume_writing(self) -> None:
        """It has left."""
        self.is_blocked = False
        for stream in list(self.streams.values()):
            if not stream.unsent and not stream.is_over:
                stream.owner.on_writable()

    # For streams and subclasses

    def send(self, data: bytes) -> None:
        """Send frames; nothing happens when the connection is gone."""
        if not self.transport.is_closing():
            self.transport.write(data)

    @property
    def num_unread(self) -> int:
        """Bytes that were to be sent and have not left."""
        return self.transport.get_write_buffer_size() + sum(stream.num_unsent for stream in self.streams.values())

    def hang_up(self) -> None:
        """Close the connection; what is not read by now is dropped, since nobody may ever read it. Idempotent."""
        if self.transport.is_closing():
            return
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def open(self, number: int, owner: Owner) -> Stream:
        """Return a new stream."""
        stream = Stream(self, number, owner, window=self._peer_window, room=self._stream_window)
        self.streams[number] = stream
        return stream

    def forget(self, stream: Stream) -> None:
        """Let nothing more come of a stream to its owner. Idempotent."""
        stream.is_over = True
        stream.unsent.clear()
        stream.num_unsent = 0
        self._held.pop(stream, None)
        self.streams.pop(stream.number, None)

    def push(self, stream: Stream) -> None:
        """Send what a stream has unsent, as far as the windows let it go."""
        unsent, parts = stream.unsent, list[bytes | memoryview]()
        while unsent:
            data, flags = unsent[0]
            size = max(0, min(len(data), frames.FRAME_BYTES, stream.window, self.window))
            if not size and data:
                break
            if size < len(data):
                unsent[0] = data[size:], flags
                data, flags = data[:size], 0
            else:
                unsent.popleft()
            stream.window -= size
            self.window -= size
            stream.num_unsent -= size
            parts += frames.HEAD.pack(size >> 8, size & 0xFF, frames.DATA, flags, stream.number), data
        if parts:
            self.send(b"".join(parts))
        if unsent:
            self._held[stream] = None
        elif stream in self._held:
            del self._held[stream]
            if not self.is_blocked:
                stream.owner.on_writable()

    def fail(self, code: int, problem: str) -> None:
        """End the connection because of what the other end did, and tell it."""
        self.is_broken = True
        if not self.transport.is_closing():
            last = max(self.streams, default=0)
            told = frames.NUMBER.pack(last) + frames.NUMBER.pack(code) + problem.encode()[:200]
            self.send(frame(frames.GOAWAY, 0, 0, told))
            self.hang_up()
        self._end(code, problem)

    def on_new_stream(self, number: int, fields: Fields, *, ends: bool) -> None:
        """The other end opened a stream; a server takes it.

        Raises:
            Http2Error: it may not.
        """
        del fields, ends
        raise Http2Error(frames.PROTOCOL_ERROR, f"stream {number} was not opened")

    def is_known(self, number: int) -> bool:
        """Return whether there was such a stream, which may be over."""
        raise NotImplementedError

    # Frames

    def _take(self, data: bytes) -> None:
        at, end = 0, len(data)
        while end - at >= frames.HEAD_BYTES:
            high, low, kind, flags, number = frames.HEAD.unpack_from(data, at)
            begin = at + frames.HEAD_BYTES
            stop = begin + (high << 8 | low)
            if stop - begin > frames.FRAME_BYTES:
                raise Http2Error(frames.FRAME_SIZE_ERROR, "a frame that is too large")
            if stop > end:
                break
            payload, at = data[begin:stop], stop
            if kind == frames.DATA and self._block is None:
                self._on_data(number, flags, payload)
            else:
                self._on_other(kind, flags, number & frames.MOST_WINDOW_BYTES, payload)
            if self.transport.is_closing():
                return
        self._rest = data[at:]

    def _on_data(self, number: int, flags: int, payload: bytes) -> None:
        size = len(payload)
        self._num_unacknowledged += size
        if self._num_unacknowledged >= _WINDOW_BYTES // 2:
            self.send(frame(frames.WINDOW_UPDATE, 0, 0, frames.NUMBER.pack(self._num_unacknowledged)))
            self._num_unacknowledged = 0
        number &= frames.MOST_WINDOW_BYTES
        stream = self.streams.get(number)
        if stream is None:
            if not self.is_known(number):
                raise Http2Error(frames.PROTOCOL_ERROR, f"data of stream {number}, which was not opened")
            self._pace.take()
            return
        stream.room -= size
        if stream.room < 0:
            raise Http2Error(frames.FLOW_CONTROL_ERROR, "more data than the window holds")
        if flags & frames.PADDED:
            payload = frames.unpadded(flags, payload)
            stream.used(size - len(payload))
        ends = bool(flags & frames.END_STREAM)
        if not payload and not ends:
            self._pace.take()
        stream.owner.on_data(payload, ends=ends)

    def _on_other(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._block is not None and (kind != frames.CONTINUATION or number != self._block[0]):
            raise Http2Error(frames.PROTOCOL_ERROR, "a block of fields was interrupted")
        self._pace.take()
        match kind:
            case frames.HEADERS:
                self._on_fields(number, flags, payload)
            case frames.CONTINUATION:
                self._on_continued(flags, payload)
            case frames.SETTINGS:
                self._on_settings(flags, payload)
            case frames.WINDOW_UPDATE:
                self._on_window(number, payload)
            case frames.PING:
                self._on_ping(flags, payload)
            case frames.RST_STREAM:
                code = _number(payload)
                if stream := self.streams.get(number):
                    self.forget(stream)
                    stream.owner.on_over(code, "the other end reset the call")
            case frames.GOAWAY:
                self._on_goaway(payload)
            case frames.PUSH_PROMISE:
                raise Http2Error(frames.PROTOCOL_ERROR, "a push, which was not asked for")
            case _:
                pass

    def _on_fields(self, number: int, flags: int, payload: bytes) -> None:
        payload = frames.unpadded(flags, payload)
        if flags & frames.HAS_PRIORITY:
            payload = payload[5:]
        self._block = number, flags, bytearray(payload)
        if flags & frames.END_HEADERS:
            self._on_block()

    def _on_continued(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise Http2Error(frames.PROTOCOL_ERROR, "a block of fields goes on that has not begun")
        self._block[2].extend(payload)
        if len(self._block[2]) > 2 * _MOST_FIELD_BYTES:
            raise Http2Error(frames.ENHANCE_YOUR_CALM, "a block of fields that is too large")
        if flags & frames.END_HEADERS:
            self._on_block()

    def _on_block(self) -> None:
        assert self._block is not None, "it has begun"
        (number, flags, block), self._block = self._block, None
        try:
            fields = self._decoder.decode(bytes(block))
        except ValueError as error:
            raise Http2Error(frames.COMPRESSION_ERROR, f"fields that can't be read: {error}") from error
        ends = bool(flags & frames.END_STREAM)
        stream = self.streams.get(number)
        if stream is not None:
            stream.owner.on_fields(fields, ends=ends)
        elif not self.is_known(number):
            self.on_new_stream(number, fields, ends=ends)

    def _on_settings(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            return
        if len(payload) % frames.SETTING.size:
            raise Http2Error(frames.FRAME_SIZE_ERROR, "settings of a wrong size")
        for name, value in frames.SETTING.iter_unpack(payload):
            if name == frames.INITIAL_WINDOW_SIZE:
                if value > frames.MOST_WINDOW_BYTES:
                    raise Http2Error(frames.FLOW_CONTROL_ERROR, "a window that is too large")
                more, self._peer_window = value - self._peer_window, value
                for stream in self.streams.values():
                    stream.window += more
                    if stream.window > frames.MOST_WINDOW_BYTES:
                        raise Http2Error(frames.FLOW_CONTROL_ERROR, "settings that make a window too large")
        self._answer(frame(frames.SETTINGS, frames.ACK, 0))
        self._push_all()

    def _on_window(self, number: int, payload: bytes) -> None:
        more = _number(payload) & frames.MOST_WINDOW_BYTES
        stream = self.streams.get(number)
        if number and stream is None:
            return
        whole = (stream.window if stream is not None else self.window) + more
        if not more or whole > frames.MOST_WINDOW_BYTES:
            raise Http2Error(frames.FLOW_CONTROL_ERROR, "a window of no size")
        if stream is None:
            self.window = whole
            self._push_all()
        else:
            stream.window = whole
            if stream.unsent:
                self.push(stream)

    def _on_ping(self, flags: int, payload: bytes) -> None:
        if len(payload) != 8:
            raise Http2Error(frames.FRAME_SIZE_ERROR, "a ping of a wrong size")
        if not flags & frames.ACK:
            self._answer(frame(frames.PING, frames.ACK, 0, payload))

    def _on_goaway(self, payload: bytes) -> None:
        last = _number(payload[:4]) & frames.MOST_WINDOW_BYTES
        for stream in [each for number, each in self.streams.items() if number > last]:
            self.forget(stream)
            stream.owner.on_over(frames.REFUSED_STREAM, "the other end takes no calls any more")

    def _answer(self, data: bytes) -> None:
        self.check_read()
        self.send(data)

    def check_read(self) -> None:
        """Check that the other end reads what it is sent.

        Raises:
            Http2Error: ENHANCE_YOUR_CALM.
        """
        if (num_unread := self.num_unread) > _MOST_UNREAD_BYTES:
            raise Http2Error(frames.ENHANCE_YOUR_CALM, f"no sign that it reads: {num_unread} bytes are not read")

    def _push_all(self) -> None:
        for stream in list(self._held):
            self.push(stream)

    def _end(self, code: int | None, problem: str) -> None:
        streams, self.streams = self.streams, {}
        self._held.clear()
        for stream in streams.values():
            if not stream.is_over:
                stream.is_over = True
                stream.owner.on_over(code, problem)


def _number(payload: bytes) -> int:
    if len(payload) != frames.NUMBER.size:
        raise Http2Error(frames.FRAME_SIZE_ERROR, "a frame of a wrong size")
    return frames.NUMBER.unpack(payload)[0]
