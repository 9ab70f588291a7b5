"""`PullResponse` by hand: cut pages into frames without a serializer, put frames into pages without a copy in between.

A frame is the protobuf encoding of `PullResponse`: tag 0x0A (field 1, bytes), the length as a varint, the payload.
What is read here may come from any protobuf encoder; what is written here can be read by any.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from headrace.v1 import transfer_service_pb2

from headrace_core.errors import TransferCorruptError

_TAG = 0x0A


def cut(pages: Iterable[memoryview], frame_bytes: int) -> Iterator[list[memoryview]]:
    """Yield the concatenation of `pages` as lists of views, each list `frame_bytes` long, the last maybe shorter."""
    frame: list[memoryview] = []
    room = frame_bytes
    for page in pages:
        rest = page
        while len(rest):
            piece = rest[:room]
            frame.append(piece)
            room -= len(piece)
            rest = rest[len(piece) :]
            if not room:
                yield frame
                frame, room = [], frame_bytes
    if frame:
        yield frame


def encode_frame(views: list[memoryview]) -> bytes:
    """Return `PullResponse(payload=the views' concatenation)` on the wire; the one copy on the sending side."""
    length = sum(len(view) for view in views)
    return b"".join((bytes((_TAG,)), _varint(length), *views))


def decode_frame(frame: bytes) -> memoryview:
    """Return the payload of a `PullResponse`, in place if it is the frame's only field.

    Raises:
        TransferCorruptError: SHORT_READ, the frame is no `PullResponse`.
    """
    view = memoryview(frame)
    if len(view) >= 2 and view[0] == _TAG:
        length, shift, index = 0, 0, 1
        while index < len(view) and shift < 35:
            byte = view[index]
            index += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                if index + length == len(view):
                    return view[index:]
                break
    try:
        return memoryview(transfer_service_pb2.PullResponse.FromString(frame).payload)
    except Exception as error:
        raise TransferCorruptError("SHORT_READ", "a frame that is no PullResponse arrived") from error


class PageWriter:
    """Writes a byte stream into destination pages, in order."""

    def __init__(self, pages: Iterable[memoryview], num_bytes: int) -> None:
        self._pages = iter(pages)
        self._rest = memoryview(b"")
        self._num_bytes = num_bytes
        self.num_written = 0

    def write(self, payload: memoryview) -> None:
        """Write the next bytes.

        Raises:
            TransferCorruptError: SHORT_READ, more bytes than the pages hold.
        """
        if self.num_written + len(payload) > self._num_bytes:
            raise TransferCorruptError("SHORT_READ", f"more than the {self._num_bytes} bytes promised arrived")
        self.num_written += len(payload)
        while len(payload):
            if not len(self._rest):
                self._rest = next(self._pages)
            count = min(len(self._rest), len(payload))
            self._rest[:count] = payload[:count]
            self._rest = self._rest[count:]
            payload = payload[count:]

    def finish(self) -> None:
        """Check that everything arrived.

        Raises:
            TransferCorruptError: SHORT_READ.
        """
        if self.num_written != self._num_bytes:
            raise TransferCorruptError(
                "SHORT_READ", f"{self.num_written} of {self._num_bytes} bytes arrived before the stream ended"
            )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
