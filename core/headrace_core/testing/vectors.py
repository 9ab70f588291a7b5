"""Vectors of the wire: `python -m headrace_core.testing.vectors` writes protos/conformance/v1.json.

Made from docs/wire-spec.md with the standard library, and not from the code that they judge: ids are packed and hashed,
values are packed row by row. Messages are encoded by protobuf itself; `json` is protobuf's mapping of the same message.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import xxhash
from google.protobuf import json_format
from google.protobuf.message import Message
from headrace.v1 import decode_service_pb2, hold_service_pb2, transfer_service_pb2, types_pb2

from headrace_core.testing.rules import EXPECTED

_TOKENS: Sequence[Sequence[int]] = ([], [0], [1, 2, 3], [2**32 - 1, 0], list(range(1000)))
_STATUS_NUMBERS = {
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "INTERNAL": 13,
    "DATA_LOSS": 15,
}


def vectors() -> dict[str, Any]:
    """Return all of them."""
    return {
        "tokens_sha256": [{"token_ids": list(ids), "sha256": _hash(ids).hex()} for ids in _TOKENS],
        "pages": [_page(attention, dtype) for attention in _ATTENTIONS for dtype in _PACKERS],
        "messages": [_message(message) for message in _messages()],
        "refusals": [
            {"reason": reason, "status": status, "code": _STATUS_NUMBERS[status]}
            for reason, status in sorted(EXPECTED.items())
        ],
    }


def _hash(token_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(b"".join(struct.pack("<I", token_id) for token_id in token_ids)).digest()


def _float32(value: float) -> bytes:
    return struct.pack("<f", value)


def _bfloat16(value: float) -> bytes:
    # The upper half of a binary32; the values below are exact in it.
    return struct.pack("<f", value)[2:]


_PACKERS: Mapping[str, Callable[[float], bytes]] = {
    "CACHE_DTYPE_FLOAT32": _float32,
    "CACHE_DTYPE_BFLOAT16": _bfloat16,
}
_ATTENTIONS: Sequence[Mapping[str, Mapping[str, int]]] = (
    {"latent": {"kv_lora_rank": 3, "rope_dim": 2}},
    {"key_value": {"num_kv_heads": 2, "head_dim": 2}},
)
_PAGE_SIZE, _NUM_TOKENS = 4, 3


def _page(attention: Mapping[str, Mapping[str, int]], dtype: str) -> dict[str, Any]:
    """Return one page of one layer, of which the last slot is unused; `rows` are what its tokens cache."""
    if "latent" in attention:
        width = sum(attention["latent"].values())
        rows = [[_value(token, column) for column in range(width)] for token in range(_NUM_TOKENS)]
        planes = [rows]
        named: dict[str, Any] = {"rows": rows}
    else:
        heads, size = attention["key_value"]["num_kv_heads"], attention["key_value"]["head_dim"]
        width = heads * size
        planes = [
            [[_value(token, column + plane * width) for column in range(width)] for token in range(_NUM_TOKENS)]
            for plane in range(2)
        ]
        named = {
            name: [[row[head * size : (head + 1) * size] for head in range(heads)] for row in plane]
            for name, plane in zip(("keys", "values"), planes, strict=True)
        }
    pack = _PACKERS[dtype]
    unused = [[0.0] * width] * (_PAGE_SIZE - _NUM_TOKENS)
    data = b"".join(pack(value) for plane in planes for row in plane + unused for value in row)
    return {
        "layout": {"num_layers": 1, "page_size": _PAGE_SIZE, "dtype": dtype, **attention},
        **named,
        "bytes": data.hex(),
        "xxh3_64": f"{xxhash.xxh3_64_intdigest(data):016x}",
    }


def _value(token: int, column: int) -> float:
    return (token * 16 + column - 20) / 8


def _messages() -> Sequence[Message]:
    """Return a message of each kind that a hand-off has, its fields set to what differs from their defaults."""
    layout = types_pb2.KvLayout(
        num_layers=2,
        page_size=4,
        dtype=types_pb2.CACHE_DTYPE_BFLOAT16,
        latent=types_pb2.LatentLayout(kv_lora_rank=3, rope_dim=2),
    )
    sampling = types_pb2.SamplingParams(max_tokens=8, temperature=0.5, seed=7, stop_token_ids=[5])
    tokens_sha256 = _hash([1, 2, 3])
    opening = hold_service_pb2.Open(
        router_id=0x0102030405060708,
        sequence_number=9,
        attempt=2,
        request_id="request-1",
        timeout_ms=30_000,
        token_ids=[1, 2, 3],
        num_prompt_tokens=2,
        tokens_sha256=tokens_sha256,
        sampling=sampling,
        sample_index=1,
        model_fingerprint="fa4e",
        layout=layout,
    )
    cached = types_pb2.CachedPrefix(address="10.0.0.2:50071", incarnation=0x2122232425262728, num_tokens=8)
    # The next turn, of which the taker has a page, and what its holder asks for in turn: it has that page, too.
    continuing = _other(opening, token_ids=range(1, 10), num_prompt_tokens=9, num_have_tokens=4, cached_prefix=cached)
    asking = _other(
        opening,
        token_ids=range(1, 9),
        num_prompt_tokens=8,
        num_have_tokens=4,
        holder_incarnation=cached.incarnation,
    )
    shard = hold_service_pb2.Shard(
        endpoint="10.0.0.1:50061",
        incarnation=0x1112131415161718,
        num_layers=2,
        transports=[types_pb2.TransportOffer(grpc=types_pb2.GrpcTransport(frame_bytes=1 << 20))],
    )
    admitted = hold_service_pb2.Admitted(
        model_fingerprint="fa4e",
        layout=layout,
        lease_key="00112233445566778899aabbccddeeff",
        num_cached_tokens=4,
        queue_us=250,
        shards=[shard],
    )
    run = hold_service_pb2.Run(
        first_page=1,
        pages=[types_pb2.PageRef(page_id=7, generation=3), types_pb2.PageRef(page_id=2, generation=1)],
        checksums=[types_pb2.LayerChecksums(page_xxh3=[1 << 63, 2]), types_pb2.LayerChecksums(page_xxh3=[3, 4])],
    )
    logprobs = types_pb2.TokenLogprobs(logprob=-0.5, top=[types_pb2.TopLogprob(token_id=11, logprob=-0.5)])
    last = hold_service_pb2.Last(
        num_tokens=3,
        tokens_sha256=tokens_sha256,
        token_id=11,
        logprobs=logprobs,
        sampling_state=types_pb2.SamplingState(seed=7, sample_index=1, position=4),
        compute_us=1200,
    )
    requests, responses = hold_service_pb2.HoldRequest, hold_service_pb2.HoldResponse
    entry: dict[str, Any] = {"sequence_number": 9, "attempt": 2}
    start = decode_service_pb2.StartSequence(
        sequence_number=9,
        attempt=2,
        request_id="request-1",
        timeout_ms=30_000,
        token_ids=[1, 2, 3],
        num_prompt_tokens=2,
        sampling=sampling,
        sample_index=1,
        prefill_address="10.0.0.1:50061",
        local_below=64,
        cached_prefix=cached,
    )
    entries = [
        decode_service_pb2.StepEntry(
            **entry, position=3, prefilled=decode_service_pb2.Prefilled(token_id=11, tokens_sha256=tokens_sha256)
        ),
        decode_service_pb2.StepEntry(
            **entry, position=4, joined=decode_service_pb2.Joined(transfer_bytes=80, transport="grpc")
        ),
        decode_service_pb2.StepEntry(
            **entry,
            position=4,
            tokens=decode_service_pb2.Tokens(token_ids=[12, 5], finish_reason=types_pb2.FINISH_REASON_STOP),
        ),
        decode_service_pb2.StepEntry(
            **entry,
            position=4,
            failure=decode_service_pb2.Failure(
                code=15, reason="CHECKSUM", message="bytes differ", side=decode_service_pb2.FAILURE_SIDE_CHANNEL
            ),
        ),
    ]
    return (
        requests(open=opening),
        requests(open=continuing),
        requests(open=asking),
        requests(confirm=hold_service_pb2.Confirm()),
        requests(),
        responses(admitted=admitted),
        responses(run=run),
        responses(last=last),
        responses(confirmed=hold_service_pb2.Confirmed()),
        responses(),
        transfer_service_pb2.PullRequest(
            lease_key="00112233445566778899aabbccddeeff",
            incarnation=0x1112131415161718,
            num_layers=2,
            first_page=1,
            num_pages=2,
            tokens_sha256=tokens_sha256,
        ),
        transfer_service_pb2.PullResponse(payload=bytes(range(200))),
        decode_service_pb2.SessionRequest(open=decode_service_pb2.OpenSession(router_id=0x0102030405060708)),
        decode_service_pb2.SessionRequest(
            open=decode_service_pb2.OpenSession(router_id=0x0102030405060708, worker_incarnation=0x1112131415161718)
        ),
        decode_service_pb2.SessionRequest(start=start),
        decode_service_pb2.SessionRequest(cancel=decode_service_pb2.CancelSequence(sequence_number=9, attempt=2)),
        decode_service_pb2.SessionResponse(entries=entries, step_us=900),
    )


def _other(opening: hold_service_pb2.Open, *, token_ids: Sequence[int], **fields: Any) -> hold_service_pb2.Open:
    """Return an order of other tokens, with their hash."""
    other = hold_service_pb2.Open()
    other.CopyFrom(opening)
    other.ClearField("token_ids")
    other.MergeFrom(hold_service_pb2.Open(token_ids=token_ids, tokens_sha256=_hash(token_ids), **fields))
    return other


def _message(message: Message) -> dict[str, Any]:
    return {
        "type": message.DESCRIPTOR.full_name,
        "json": json_format.MessageToDict(message),
        "bytes": message.SerializeToString(deterministic=True).hex(),
    }


def text() -> str:
    """Return the file."""
    return json.dumps(vectors(), indent=1) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
