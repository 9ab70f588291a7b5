"""A ticket survives the wire, and one that contradicts itself is not usable."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

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


def test_a_ticket_names_the_position_of_the_token_that_comes_next():
    """The first token has position `num_tokens`; decode samples the one after it."""
    assert encode_ticket(ticket()).sampling_state.position == 8


def test_a_first_token_without_logprobs_stays_without():
    message = encode_ticket(replace(ticket(), first_token=SampledToken(11)))
    assert not message.HasField("first_token_logprobs")
    assert decode_ticket(message).first_token == SampledToken(11)


@pytest.mark.parametrize(("lease_s", "duration_ms"), [(30.0, 30_000), (0.0126, 13), (0.0004, 1), (0.0, 1)])
def test_a_lease_lasts_whole_milliseconds_and_at_least_one(lease_s: float, duration_ms: int):
    message = encode_ticket(replace(ticket(), lease_s=lease_s))
    assert message.lease.duration_ms == duration_ms
    assert decode_ticket(message).lease_s == duration_ms / 1000


def test_a_ticket_of_a_finished_sequence_has_no_lease_and_can_not_be_taken():
    message = encode_ticket(replace(ticket(), lease_id=""))
    assert not message.HasField("lease")
    with pytest.raises(InvalidRequestError, match="there is no lease") as raised:
        decode_ticket(message)
    assert raised.value.reason == "BAD_HANDOFF"


def test_the_smallest_ticket_is_usable():
    smallest = replace(
        ticket(), attempt=1, page_ids=(0,), generations=(0,), checksums=((0,), (0,)), num_tokens=1, lease_s=0.001
    )
    assert decode_ticket(encode_ticket(smallest)) == smallest


def test_a_ticket_moves_its_pages_of_all_layers():
    assert ticket().num_bytes == 2 * 2 * 4 * (512 + 64) * 2


def test_every_page_has_its_generation():
    with pytest.raises(ValueError, match="zip"):
        encode_ticket(replace(ticket(), generations=(0,)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "attempt", 0), "attempt is 0"),
        (lambda m: setattr(m, "holder_endpoint", ""), "holder_endpoint is empty"),
        (lambda m: setattr(m.lease, "lease_id", ""), "there is no lease"),
        (lambda m: m.ClearField("lease"), "there is no lease"),
        (lambda m: setattr(m, "num_tokens", 0), "num_tokens is 0"),
        (lambda m: setattr(m, "tokens_sha256", b"x"), "tokens_sha256 has 1 bytes; is the holder an older one?"),
        (lambda m: m.pages.add(), "7 tokens take 2 pages, not as listed"),
        (lambda m: m.pages.pop(), "7 tokens take 2 pages, not as listed"),
        (lambda m: m.checksums.add(page_xxh3=[1, 2]), "checksums do not have one entry for each layer"),
        (lambda m: m.checksums.pop(), "checksums do not have one entry for each layer"),
        (lambda m: m.checksums[1].page_xxh3.append(1), "a layer lacks checksums"),
        (lambda m: m.checksums[1].page_xxh3.pop(), "a layer lacks checksums"),
        (lambda m: setattr(m.sampling_state, "position", 9), "the sampling position does not fit num_tokens"),
    ],
)
def test_an_unusable_ticket_says_what_is_wrong(change: Callable[[types_pb2.Handoff], object], words: str):
    message = encode_ticket(ticket())
    change(message)
    with pytest.raises(InvalidRequestError) as raised:
        decode_ticket(message)
    assert raised.value.reason == "BAD_HANDOFF"
    assert str(raised.value) == f"the ticket is not usable: {words}"


def test_a_ticket_for_no_request_is_refused():
    with pytest.raises(InvalidRequestError, match="request_id"):
        decode_ticket(encode_ticket(replace(ticket(), request_id="")))


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
