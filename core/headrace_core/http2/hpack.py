"""Header fields as HTTP/2 carries them (RFC 7541): read in every form, written in the plainest.

What is written uses no dynamic table and no Huffman code, so nothing of it depends on what came before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from headrace_core.http2 import huffman

Fields = list[tuple[bytes, bytes]]

_TABLE_BYTES = 4096
"""Of the dynamic table; HTTP/2's default, which nothing here changes."""
_ENTRY_BYTES = 32
"""What an entry counts beside its name and value."""
_MOST_CONTINUED = 4
"""Bytes of a number after its first: 2^28, far more than any length here."""
_STATIC: tuple[tuple[bytes, bytes], ...] = (
    (b":authority", b""), (b":method", b"GET"), (b":method", b"POST"), (b":path", b"/"), (b":path", b"/index.html"),
    (b":scheme", b"http"), (b":scheme", b"https"), (b":status", b"200"), (b":status", b"204"), (b":status", b"206"),
    (b":status", b"304"), (b":status", b"400"), (b":status", b"404"), (b":status", b"500"), (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"), (b"accept-language", b""), (b"accept-ranges", b""), (b"accept", b""),
    (b"access-control-allow-origin", b""), (b"age", b""), (b"allow", b""), (b"authorization", b""),
    (b"cache-control", b""), (b"content-disposition", b""), (b"content-encoding", b""), (b"content-language", b""),
    (b"content-length", b""), (b"content-location", b""), (b"content-range", b""), (b"content-type", b""),
    (b"cookie", b""), (b"date", b""), (b"etag", b""), (b"expect", b""), (b"expires", b""), (b"from", b""),
    (b"host", b""), (b"if-match", b""), (b"if-modified-since", b""), (b"if-none-match", b""), (b"if-range", b""),
    (b"if-unmodified-since", b""), (b"last-modified", b""), (b"link", b""), (b"location", b""),
    (b"max-forwards", b""), (b"proxy-authenticate", b""), (b"proxy-authorization", b""), (b"range", b""),
    (b"referer", b""), (b"refresh", b""), (b"retry-after", b""), (b"server", b""), (b"set-cookie", b""),
    (b"strict-transport-security", b""), (b"transfer-encoding", b""), (b"user-agent", b""), (b"vary", b""),
    (b"via", b""), (b"www-authenticate", b""),
)  # fmt: skip
"""Appendix A, from index 1."""


def encode(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a header block."""
    block = bytearray()
    for name, value in fields:
        block.append(0)  # a literal that is not indexed, with its name
        for text in (name, value):
            block += _number(len(text), 7)
            block += text
    return bytes(block)


class Decoder:
    """Of one direction of a connection: blocks must come in order."""

    def __init__(self, most_bytes: int) -> None:
        """Args: `most_bytes` of one block's fields, names and values and 32 for each."""
        self._most_bytes = most_bytes
        self._table: deque[tuple[bytes, bytes]] = deque()
        """The newest first."""
        self._table_bytes = 0
        self._limit = _TABLE_BYTES

    def decode(self, block: bytes) -> Fields:
        """Return the fields of a block.

        Raises:
            ValueError: it is none, or holds too much.
        """
        fields: Fields = []
        at = num_bytes = 0
        try:
            while at < len(block):
                first = block[at]
                if first & 0x80:
                    index, at = _read_number(block, at, 7)
                    field = self._at(index)
                elif first & 0xC0 == 0x40:
                    field, at = self._literal(block, at, 6)
                    self._keep(field)
                elif first & 0xE0 == 0x20:
                    self._limit, at = _read_number(block, at, 5)
                    if self._limit > _TABLE_BYTES or fields:
                        raise ValueError("a table that is too large, or that changes late")
                    self._evict()
                    continue
                else:
                    field, at = self._literal(block, at, 4)
                fields.append(field)
                num_bytes += _size(field)
                if num_bytes > self._most_bytes:
                    raise ValueError(f"more than {self._most_bytes} bytes of fields")
        except IndexError:
            raise ValueError("a block that ends within a field") from None
        return fields

    def _literal(self, block: bytes, at: int, bits: int) -> tuple[tuple[bytes, bytes], int]:
        index, at = _read_number(block, at, bits)
        if index:
            name = self._at(index)[0]
        else:
            name, at = _read_text(block, at)
        value, at = _read_text(block, at)
        return (name, value), at

    def _at(self, index: int) -> tuple[bytes, bytes]:
        if not 0 < index <= len(_STATIC) + len(self._table):
            raise ValueError(f"no entry {index}")
        return _STATIC[index - 1] if index <= len(_STATIC) else self._table[index - len(_STATIC) - 1]

    def _keep(self, field: tuple[bytes, bytes]) -> None:
        self._table.appendleft(field)
        self._table_bytes += _size(field)
        self._evict()

    def _evict(self) -> None:
        while self._table_bytes > self._limit:
            self._table_bytes -= _size(self._table.pop())


def _size(field: tuple[bytes, bytes]) -> int:
    return len(field[0]) + len(field[1]) + _ENTRY_BYTES


def _number(value: int, bits: int) -> bytes:
    most = (1 << bits) - 1
    if value < most:
        return bytes([value])
    encoded, value = bytearray([most]), value - most
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_number(block: bytes, at: int, bits: int) -> tuple[int, int]:
    most = (1 << bits) - 1
    value, at = block[at] & most, at + 1
    if value < most:
        return value, at
    for place in range(_MOST_CONTINUED):
        byte, at = block[at], at + 1
        value += (byte & 0x7F) << 7 * place
        if not byte & 0x80:
            return value, at
    raise ValueError("a number that is too large")


def _read_text(block: bytes, at: int) -> tuple[bytes, int]:
    is_code = block[at] & 0x80
    length, at = _read_number(block, at, 7)
    text = block[at : at + length]
    if len(text) < length:
        raise ValueError("a block that ends within a string")
    return huffman.decode(text) if is_code else text, at + length
