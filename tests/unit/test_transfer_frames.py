"""Frames written by hand are protobuf's, and what protobuf writes can be read."""

import pytest
from headrace.v1 import transfer_service_pb2
from headrace_core.errors import TransferCorruptError
from headrace_core.transfer.frames import PageWriter, cut, decode_frame, encode_frame
from hypothesis import given
from hypothesis import strategies as st

PAGES = st.lists(st.binary(max_size=300), max_size=8)


@given(PAGES, st.integers(1, 500))
def test_frames_are_the_protobuf_encoding_of_the_concatenation(pages, frame_bytes):
    frames = [encode_frame(views) for views in cut(map(memoryview, pages), frame_bytes)]
    payloads = [transfer_service_pb2.PullResponse.FromString(frame).payload for frame in frames]
    assert b"".join(payloads) == b"".join(pages)
    assert all(len(payload) == frame_bytes for payload in payloads[:-1])


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 1 << 20])
def test_every_length_is_read_back_in_place(size):
    payload = bytes(size)
    frame = transfer_service_pb2.PullResponse(payload=payload).SerializeToString()
    assert bytes(decode_frame(frame)) == payload
    if size:
        assert encode_frame([memoryview(payload)]) == frame


def test_a_frame_with_a_field_of_a_later_version_is_read():
    frame = transfer_service_pb2.PullResponse(payload=b"abc").SerializeToString() + b"\x10\x05"
    assert bytes(decode_frame(frame)) == b"abc"


@pytest.mark.parametrize("frame", [b"\x0a\x05abc", b"\xff", b"\x0a"])
def test_what_is_no_frame_is_refused(frame):
    with pytest.raises(TransferCorruptError):
        decode_frame(frame)


@given(PAGES, st.integers(1, 500))
def test_pages_are_filled_in_order(pages, frame_bytes):
    destination = [bytearray(len(page)) for page in pages]
    size = sum(len(page) for page in pages)
    writer = PageWriter(map(memoryview, destination), size)
    for views in cut(map(memoryview, pages), frame_bytes):
        writer.write(decode_frame(encode_frame(views)))
    writer.finish()
    assert destination == pages


def test_too_many_or_too_few_bytes_are_a_short_read():
    page = bytearray(4)
    writer = PageWriter([memoryview(page)], 4)
    writer.write(memoryview(b"abc"))
    with pytest.raises(TransferCorruptError) as raised:
        writer.finish()
    assert raised.value.reason == "SHORT_READ"
    with pytest.raises(TransferCorruptError):
        writer.write(memoryview(b"de"))
