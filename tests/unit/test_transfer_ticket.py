"""A ticket survives the wire, and one that contradicts itself is not usable."""

import hashlib

import pytest
from headrace.v1 import types_pb2
from headrace_core.errors import InvalidRequestError
from headrace_core.kv.layout import CacheDtype, KeyValueAttention, KvLayout, LatentAttention
from headrace_core.request import SampledToken, TokenLogprobs, hash_tokens
from headrace_core.transfer.ticket import Ticket, decode_ticket, encode_ticket

LAYOUTS = [
    KvLayout(2, 4, CacheDtype.BFLOAT16, LatentAttention(512, 64)),
    KvLayout(2, 4, CacheDtype.FLOAT32, KeyValueAttention(8, 128)),
]


def ticket(layout: KvLayout = LAYOUTS[0]) -> Ticket:
    return Ticket(
        request_id="r",
        attempt=3,
        holder_endpoint="10.0.0.1:5000",
        holder_incarnation=(1 << 64) - 1,
        model_fingerprint="fa4e",
        layout=layout,
        page_ids=(5, 9),
        generations=(0, 1 << 40),
        checksums=(((1 << 64) - 1, 0), (1, 2)),
        num_tokens=7,
        tokens_sha256=hash_tokens([1, 2, 3, 4, 5, 6, 7]),
        first_token=SampledToken(11, TokenLogprobs(-0.5, ((11, -0.5), (3, -2.0)))),
        seed=(1 << 64) - 1,
        sample_index=2,
        lease_id="lease-1",
        lease_s=30.0,
        offers=(types_pb2.TransportOffer(grpc=types_pb2.GrpcTransport(frame_bytes=1 << 20)),),
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=["latent", "key-value"])
def test_a_ticket_survives_the_wire(layout):
    wire = encode_ticket(ticket(layout)).SerializeToString()
    assert decode_ticket(types_pb2.Handoff.FromString(wire)) == ticket(layout)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attempt", 0),
        ("holder_endpoint", ""),
        ("num_tokens", 0),
        ("num_tokens", 9),
        ("num_tokens", 4),
        ("lease.duration_ms", 0),
        ("layout.page_size", 0),
        ("layout.dtype", types_pb2.CACHE_DTYPE_UNSPECIFIED),
        ("sampling_state.position", 7),
        ("tokens_sha256", b""),
        ("tokens_sha256", bytes(31)),
        ("tokens_sha256", bytes(33)),
    ],
)
def test_a_ticket_that_contradicts_itself_is_refused(field: str, value: object):
    message = encode_ticket(ticket())
    target = message
    *path, name = field.split(".")
    for part in path:
        target = getattr(target, part)
    setattr(target, name, value)
    with pytest.raises(InvalidRequestError) as raised:
        decode_ticket(message)
    assert raised.value.reason == "BAD_HANDOFF"


def test_tokens_are_hashed_as_the_wire_says():
    on_the_wire = bytes.fromhex("00000000 01000000 00f90100 ffffffff")
    assert hash_tokens([0, 1, 129_280, 0xFFFF_FFFF]) == hashlib.sha256(on_the_wire).digest()
    assert hash_tokens([]) == hashlib.sha256(b"").digest()


@pytest.mark.parametrize("token_id", [-1, 1 << 32])
def test_an_id_that_has_no_four_bytes_has_no_hash(token_id: int):
    with pytest.raises(OverflowError):
        hash_tokens([5, token_id])
