"""gRPC's messages in a stream's bytes: each has a prefix, a flag and its length."""

from __future__ import annotations

import struct

_PREFIX = struct.Struct(">BI")


def prefixed(message: bytes) -> bytes:
    """Return a message as it travels."""
    return _PREFIX.pack(0, len(message)) + message


class Messages:
    """Cuts a stream's bytes into messages."""

    def __init__(self, most_bytes: int) -> None:
        """Args: `most_bytes` of one message."""
        self._most_bytes = most_bytes
        self._partial = bytearray()
        self._needed = _PREFIX.size
        """Bytes of `_partial` with which something can be made of it."""

    @property
    def is_between(self) -> bool:
        """True if nothing of a message has come that is not whole."""
        return not self._partial

    @property
    def num_missing(self) -> int:
        """Bytes of the message, or its prefix, that are still to come."""
        return self._needed - len(self._partial)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes; return the messages that they complete.

        Raises:
            ValueError: a message is compressed, which was not offered, or too large.
        """
        if self._partial:
            self._partial += data
            if len(self._partial) < self._needed:
                return []
            data = bytes(self._partial)
            self._partial.clear()
        found: list[bytes] = []
        at, end = 0, len(data)
        self._needed = _PREFIX.size
        while end - at >= _PREFIX.size:
            is_compressed, size = _PREFIX.unpack_from(data, at)
            if is_compressed:
                raise ValueError("a compressed message, which was not offered")
            if size > self._most_bytes:
                raise ValueError(f"a message of {size} bytes; at most {self._most_bytes} are taken")
            begin = at + _PREFIX.size
            if begin + size > end:
                self._needed = begin + size - at
                break
            at = begin + size
            found.append(data[begin:at])
        self._partial += data[at:]
        return found
