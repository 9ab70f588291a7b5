"""Header fields of HTTP/2 as they are read and written: Huffman codes, the table, and its bounds."""

import pytest
from headrace_core.http2 import huffman
from headrace_core.http2.hpack import Decoder, encode


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("f1e3c2e5f23a6ba0ab90f4ff", b"www.example.com"),
        ("a8eb10649cbf", b"no-cache"),
        ("25a849e95ba97d7f", b"custom-key"),
        ("9d29ad171863c78f0b97c8e9ae82ae43d3", b"https://www.example.com"),
        ("", b""),
    ],
)
def test_huffman_codes_of_the_rfc_are_read(code, text):
    assert huffman.decode(bytes.fromhex(code)) == text


@pytest.mark.parametrize("code", ["ff", "ffffffff", "f1e3c2e5f23a6ba0ab90f4", "00ff00"])
def test_what_is_no_huffman_code_is_refused(code):
    with pytest.raises(ValueError, match="string"):
        huffman.decode(bytes.fromhex(code))


def test_the_requests_of_the_rfc_are_read_with_their_table():
    """C.4: three requests with Huffman codes, of which the later ones name what the earlier ones put in the table."""
    decoder = Decoder(8192)
    blocks = [
        "828684418cf1e3c2e5f23a6ba0ab90f4ff",
        "828684be5886a8eb10649cbf",
        "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
    ]
    first, second, third = (dict(decoder.decode(bytes.fromhex(block))) for block in blocks)
    assert first[b":authority"] == second[b":authority"] == third[b":authority"] == b"www.example.com"
    assert second[b"cache-control"] == b"no-cache"
    assert third == {
        b":method": b"GET", b":scheme": b"https", b":path": b"/index.html", b":authority": b"www.example.com",
        b"custom-key": b"custom-value",
    }  # fmt: skip


def test_responses_of_the_rfc_evict_what_the_table_has_no_room_for():
    """C.5, with its table of 256 bytes."""
    decoder = Decoder(8192)
    decoder.decode(bytes.fromhex("3fe101"))
    blocks = [
        "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d546e1768747470733a2f2f"
        "7777772e6578616d706c652e636f6d",
        "4803333037c1c0bf",
    ]
    first, second = (decoder.decode(bytes.fromhex(block)) for block in blocks)
    assert first[0] == (b":status", b"302")
    assert second == [(b":status", b"307"), *first[1:]]
    with pytest.raises(ValueError, match="no entry 66"):
        decoder.decode(bytes.fromhex("c2"))


@pytest.mark.parametrize("block", ["ff", "c0", "00", "0003616263", "3fe1ff03", "7f80808080808080", "8220"])
def test_a_block_that_is_none_is_refused(block):
    with pytest.raises(ValueError, match=r"block|entry|table|number"):
        Decoder(8192).decode(bytes.fromhex(block))


def test_a_block_that_names_a_large_entry_again_and_again_is_refused():
    decoder = Decoder(8192)
    with pytest.raises(ValueError, match="more than 8192 bytes"):
        decoder.decode(b"\x40\x01a\x7f\x81\x1e" + b"v" * 4000 + b"\xbe" * 1000)


def test_what_is_encoded_is_read():
    fields = [(b":path", b"/" + b"x" * 300), (b"empty", b""), (b"n" * 127, b"v" * 16_000)]
    assert Decoder(1 << 20).decode(encode(fields)) == fields
