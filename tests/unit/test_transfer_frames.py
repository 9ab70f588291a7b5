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


def test_a_page_is_cut_where_the_frame_ends_and_nothing_is_copied():
    pages = [memoryview(bytes(range(10))), memoryview(bytes(range(10, 14)))]
    frames = list(cut(pages, 4))
    assert [[bytes(view) for view in frame] for frame in frames] == [
        [bytes(range(4))],
        [bytes(range(4, 8))],
        [bytes([8, 9]), bytes([10, 11])],
        [bytes([12, 13])],
    ]
    assert all(view.obj in (pages[0].obj, pages[1].obj) for frame in frames for view in frame)


def test_no_empty_frame_is_sent():
    assert list(cut([], 4)) == []
    assert list(cut([memoryview(b"")], 4)) == []
    assert [len(frame) for frame in cut([memoryview(b"abcd"), memoryview(b"")], 4)] == [1]


def test_a_frame_is_a_tag_a_length_and_the_bytes():
    assert encode_frame([memoryview(b"ab"), memoryview(b"c")]) == b"\x0a\x03abc"
    assert encode_frame([memoryview(bytes(128))])[:3] == b"\x0a\x80\x01"
    assert encode_frame([]) == b"\x0a\x00"


@pytest.mark.parametrize("size", [0, 1, 127, 128, 300, 16384, 1 << 21])
def test_the_payload_is_not_copied_on_arrival(size):
    frame = encode_frame([memoryview(bytes(size))])
    payload = decode_frame(frame)
    assert payload.obj is frame
    assert len(payload) == size


def test_a_length_in_more_bytes_than_it_needs_is_read():
    assert bytes(decode_frame(b"\x0a\x83\x80\x80\x80\x00abc")) == b"abc"


@pytest.mark.parametrize(
    "frame",
    [
        b"\x0a\x02abc",
        b"\x0a\x04abc",
        b"\x0a" + b"\x80" * 5 + b"\x01",
        b"\x0a" + b"\xff" * 11 + b"abc",
        b"\x0a\x80",
        b"\x08\x03abc",
    ],
)
def test_a_frame_whose_length_is_not_its_own_is_refused(frame):
    with pytest.raises(TransferCorruptError) as raised:
        decode_frame(frame)
    assert raised.value.reason == "SHORT_READ"
    assert "no PullResponse" in str(raised.value)


def test_a_frame_without_a_payload_is_empty():
    assert bytes(decode_frame(b"")) == b""
    assert bytes(decode_frame(b"\x0a\x00")) == b""


def test_the_last_of_two_payloads_counts_as_protobuf_says():
    assert bytes(decode_frame(b"\x0a\x01a\x0a\x01b")) == b"b"


def test_a_writer_counts_what_it_wrote_and_takes_nothing_beyond_the_promise():
    pages = [bytearray(2), bytearray(0), bytearray(2)]
    writer = PageWriter(map(memoryview, pages), 4)
    writer.write(memoryview(b"abc"))
    assert writer.num_written == 3
    with pytest.raises(TransferCorruptError, match="more than the 4 bytes promised arrived") as raised:
        writer.write(memoryview(b"de"))
    assert raised.value.reason == "SHORT_READ"
    assert pages == [b"ab", b"", b"c\0"]
    writer.write(memoryview(b"d"))
    writer.finish()
    assert pages == [b"ab", b"", b"cd"]


def test_a_stream_that_ends_early_says_how_much_came():
    writer = PageWriter([memoryview(bytearray(4))], 4)
    writer.write(memoryview(b""))
    writer.write(memoryview(b"abc"))
    with pytest.raises(TransferCorruptError, match="3 of 4 bytes arrived before the stream ended") as raised:
        writer.finish()
    assert raised.value.reason == "SHORT_READ"
