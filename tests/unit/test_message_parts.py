"""What a message costs is seen before it is decoded, and never more than there is."""

import contextlib
import random

import pytest
from google.protobuf.message import DecodeError
from headrace.v1 import generation_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace_core.message_parts import has_more_parts
from hypothesis import given, settings
from hypothesis import strategies as st

DESCRIPTOR = pb.GenerateRequest.DESCRIPTOR
LIMIT = 100


def has_more(message: bytes, limit: int = LIMIT) -> bool:
    return has_more_parts(message, DESCRIPTOR, limit)


def chat(num_messages: int, **fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage(**fields)] * num_messages))


def sampling(**fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(sampling=types_pb2.SamplingParams(**fields))


MANY = 100 * LIMIT
HOSTILE = {
    "empty chat messages": chat(MANY),
    "short chat messages": chat(MANY, role="user", content="hi"),
    "stop strings": sampling(stop_strings=[""] * MANY),
    "stop ids": sampling(stop_token_ids=range(2 * MANY)),
    "biases": sampling(logit_bias=[types_pb2.LogitBias()] * MANY),
    "token ids": pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[1] * (2 * MANY))),
}
HONEST = {
    "a long text": pb.GenerateRequest(text=pb.TextPrompt(text="x" * (4 << 20))),
    "a long conversation": chat(LIMIT - 2, role="user", content="x" * 1000),
    "many token ids": pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=range(100 * LIMIT))),
    "a long message": chat(1, role="user", content="\x0a\x00" * (2 << 20)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_message_of_many_parts_is_seen(name):
    assert has_more(HOSTILE[name].SerializeToString())


@pytest.mark.parametrize("name", HONEST)
def test_a_large_message_of_few_parts_is_none(name):
    assert not has_more(HONEST[name].SerializeToString())


def test_parts_are_seen_however_they_are_written():
    empty_messages = b"\x0a\x00" * MANY
    size = pb.TextPrompt(text="x" * len(empty_messages)).SerializeToString()[1 : -len(empty_messages)]
    assert has_more(b"\x2a" + size + empty_messages)
    assert has_more(b"\x2a\x80\x80\x00".replace(b"\x80\x80\x00", size) + empty_messages)
    unpacked = b"\x08\x01" * MANY
    assert has_more(b"\x22" + size + unpacked)
    assert has_more(b"\x2a\x00" * MANY), "the same field again and again"
    assert has_more(b"\xf8\x07\x01" * MANY), "fields that nobody knows"


def test_the_count_is_exact_at_the_limit():
    message = chat(500, content="x" * 9).SerializeToString()
    assert not has_more(message, 501)
    assert has_more(message, 500)


def test_bytes_that_are_no_message_are_refused_or_left_to_the_decoder():
    die = random.Random(3)
    whole = chat(20, role="user", content="hi").SerializeToString()
    for _ in range(300):
        _agrees_with_the_decoder(die.randbytes(300))
        _agrees_with_the_decoder(whole[: die.randrange(len(whole))])
    with pytest.raises(DecodeError):
        has_more(b"\xff" * 100_000)


def test_a_varint_is_read_to_its_tenth_byte_and_no_further():
    """By the message, not by time: read on, the varint would end and nothing be wrong."""
    endless = b"\x08" + b"\x80" * 1_000_000 + b"\x00"
    with pytest.raises(DecodeError):
        has_more(endless)
    assert has_more(b"\xf8\x07" + b"\x80" * 9 + b"\x01" + b"\x2a\x00" * MANY)


def varint(number: int) -> bytes:
    head = b""
    while number >= 0x80:
        head, number = head + bytes([number & 0x7F | 0x80]), number >> 7
    return head + bytes([number])


def delimited(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def group(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 3) + content + varint(number << 3 | 4)


EMPTY_CHAT = delimited(5, b"\x0a\x00" * MANY)


@pytest.mark.parametrize("number", [1, 5, 99, 1 << 28])
@pytest.mark.parametrize("content", [b"", b"\x08\x01", group(7, group(99, b"")), EMPTY_CHAT], ids=len)
def test_parts_are_counted_behind_a_group_and_in_it(number, content):
    hidden = group(number, content)
    for message in (hidden + EMPTY_CHAT, EMPTY_CHAT + hidden, delimited(5, hidden + b"\x0a\x00" * MANY)):
        assert len(pb.GenerateRequest.FromString(message).chat.messages) == MANY
        assert has_more(message)
    assert has_more(group(number, b"\x08\x01" * MANY))


@pytest.mark.parametrize("broken", ["9b06", "9c06", "9b06a406", "9b069b069c06", "9b06120a9c06"])
def test_a_group_that_does_not_end_is_no_message(broken):
    message = HOSTILE["short chat messages"].SerializeToString() + bytes.fromhex(broken)
    with pytest.raises(DecodeError):
        pb.GenerateRequest.FromString(message)
    with pytest.raises(DecodeError):
        has_more(message, 4 * MANY)


_NUMBERS = st.one_of(st.integers(1, 12), st.sampled_from([99, 1000, 1 << 28, (1 << 29) - 1]))
_VARINTS = st.one_of(st.integers(0, 300), st.integers(0, (1 << 64) - 1))
_SCALARS = st.one_of(
    st.builds(lambda number, value: varint(number << 3) + varint(value), _NUMBERS, _VARINTS),
    st.builds(lambda number, value: varint(number << 3) + b"\x80" * 9 + bytes([value]), _NUMBERS, st.integers(0, 3)),
    st.builds(lambda number, value: varint(number << 3 | 1) + value, _NUMBERS, st.binary(min_size=8, max_size=8)),
    st.builds(lambda number, value: varint(number << 3 | 5) + value, _NUMBERS, st.binary(min_size=4, max_size=4)),
    st.builds(delimited, _NUMBERS, st.binary(max_size=6)),
    st.builds(delimited, _NUMBERS, st.lists(_VARINTS.map(varint), max_size=9).map(b"".join)),
)
_FIELDS = st.recursive(
    st.one_of(
        _SCALARS,
        st.sampled_from(
            [honest.SerializeToString() for honest in (chat(3), sampling(stop_strings=["", "x"]), chat(1, role="user"))]
        ),
    ),
    lambda inside: st.builds(
        lambda make, number, content: make(number, b"".join(content)),
        st.sampled_from([delimited, group]), _NUMBERS, st.lists(inside, max_size=5),
    ),
    max_leaves=25,
)  # fmt: skip


@st.composite
def _wires(draw):
    """Bytes that mostly are a message: fields of every wire type, then some bytes changed, put in or taken away."""
    wire = bytearray(b"".join(draw(st.lists(_FIELDS, max_size=8))))
    for _ in range(draw(st.integers(0, 2))):
        position = draw(st.integers(0, len(wire)))
        wire[position : position + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(wire)


def _num_entries(message) -> int:
    """Return how many messages and strings were made to decode a message, itself not counted."""
    num = 0
    for field, value in message.ListFields():
        values = list(value) if field.is_repeated else [value]
        if field.message_type is not None:
            num += sum(1 + _num_entries(each) for each in values)
        elif field.is_repeated and field.type == field.TYPE_STRING:
            num += len(values)
    return num


def _agrees_with_the_decoder(wire: bytes) -> None:
    """Check that what the decoder takes has as many parts as entries, and is not called damaged."""
    padded = wire + delimited(99, bytes(2 * len(wire) + 9))
    try:
        message = pb.GenerateRequest.FromString(wire)
    except DecodeError:
        with contextlib.suppress(DecodeError):
            has_more(padded, len(wire) + 1)
        return
    assert not has_more(padded, len(wire) + 1)
    num_entries = _num_entries(message)
    assert num_entries == 0 or has_more(padded, num_entries)


@settings(max_examples=150)
@given(_wires())
def test_whatever_the_decoder_takes_is_counted(wire):
    _agrees_with_the_decoder(wire)
