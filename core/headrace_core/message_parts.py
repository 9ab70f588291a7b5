"""What a message costs to decode, seen before it is decoded.

Two bytes of a message can be an entry that takes fifty in memory: 8 MiB of empty chat messages decode for half a second
into 220 MiB. So parts are counted along the wire: one for each field, and one for 128 packed numbers. A message without
repeated fields is one part whatever is in it: it can't grow. Groups, which our types don't have but the decoder takes,
are counted with what is in them. Counting stops at the limit, and so does its time, about 0.3 µs a part.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

_PACKED_PER_PART = 128
_LEAST_PART_BYTES = 2
_VARINT_BYTES = 10
"""At most; the decoder takes no longer one, and reading on would take time without a part."""
_CONTINUED = bytes(range(0x80, 0x100))
"""Bytes of a varint that are not its last."""
_TEXT_TYPES = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is counted inside a message type: its fields with parts of their own, by number."""

    messages: dict[int, _Shape]
    packed: frozenset[int]


_UNKNOWN = _Shape({}, frozenset())
"""Of a field that the type does not have: kept as bytes, so that nothing in it can grow."""


def has_more_parts(message: bytes, descriptor: Descriptor, limit: int) -> bool:
    """Return whether `message`, encoded and of the type that `descriptor` describes, has more than `limit` parts.

    What is too short to have more is not looked at. Otherwise whatever the decoder would take is counted.

    Raises:
        DecodeError: it is no message; the decoder would say so, too.
    """
    if len(message) <= limit * _LEAST_PART_BYTES:
        return False
    try:
        return _count(message, 0, len(message), _shape(descriptor), limit) > limit
    except IndexError:
        raise DecodeError("the message is cut short") from None


@functools.cache
def _shape(descriptor: Descriptor) -> _Shape:
    messages: dict[int, _Shape] = {}
    packed: set[int] = set()
    for field in descriptor.fields:
        if field.message_type is not None:
            inside = _shape(field.message_type)
            if inside.messages or inside.packed or any(part.is_repeated for part in field.message_type.fields):
                messages[field.number] = inside
        elif field.is_repeated and field.type not in _TEXT_TYPES:
            packed.add(field.number)
    return _Shape(messages, frozenset(packed))


def _count(message: bytes, position: int, end: int, shape: _Shape, limit: int) -> int:
    """Return the number of parts from `position` to `end`, or some number over `limit`.

    Numbers are read in place: calls would cost five times the rest.

    Raises:
        DecodeError: the bytes are no message.
    """
    count = 0
    groups: list[tuple[int, _Shape]] = []
    """Those that have begun and not ended: their numbers, and what is around them."""
    while position < end:
        count += 1
        if count > limit:
            return count
        tag = message[position]
        position += 1
        if tag >= 0x80:
            tag, position = _varint(message, position - 1)
        kind = tag & 7
        if kind == 2:
            size = message[position]
            position += 1
            if size >= 0x80:
                size, position = _varint(message, position - 1)
            start, position = position, position + size
            if position > end:
                raise DecodeError("a part is longer than what it is in")
            number = tag >> 3
            if size and number in shape.messages:
                count += _count(message, start, position, shape.messages[number], limit - count)
            elif number in shape.packed:
                count += len(message[start:position].translate(None, _CONTINUED)) // _PACKED_PER_PART
        elif kind == 0:
            last = position + _VARINT_BYTES - 1
            while message[position] >= 0x80:
                if position == last:
                    raise DecodeError("a varint without end")
                position += 1
            position += 1
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        elif kind == 3:
            groups.append((tag >> 3, shape))
            shape = shape.messages.get(tag >> 3, _UNKNOWN)
        elif kind == 4 and groups and groups[-1][0] == tag >> 3:
            count -= 1
            _, shape = groups.pop()
        else:
            raise DecodeError("no wire type, or the end of a group that did not begin")
    if position > end or groups:
        raise DecodeError("a part does not end with what it is in")
    return count


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Return the number at `position` and where the next thing begins."""
    value = 0
    for shift in range(0, 7 * _VARINT_BYTES, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise DecodeError("a varint without end")
