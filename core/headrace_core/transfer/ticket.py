"""The hand-off ticket as a value: checked when it is read, complete when it is written."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.v1 import types_pb2

from headrace_core.errors import InvalidRequestError
from headrace_core.kv.layout import KvLayout
from headrace_core.request import SampledToken, check_request_id
from headrace_core.wire import decode_layout, decode_logprobs, encode_layout, encode_logprobs

_SHA256_BYTES = 32


@dataclass(frozen=True, slots=True)
class Ticket:
    """`Handoff` of types.proto, whose fields these are.

    `lease_id` is empty when nothing is held. `checksums` are xxh3-64 of each page's bytes, [num_layers][pages];
    `tokens_sha256` is `request.hash_tokens` of the tokens whose cache the pages hold, `num_tokens` of them; `offers`
    is every way to move the bytes, best first.
    """

    request_id: str
    attempt: int
    holder_endpoint: str
    holder_incarnation: int
    model_fingerprint: str
    layout: KvLayout
    page_ids: tuple[int, ...]
    generations: tuple[int, ...]
    checksums: tuple[tuple[int, ...], ...]
    num_tokens: int
    tokens_sha256: bytes
    first_token: SampledToken
    seed: int
    sample_index: int
    lease_id: str
    lease_s: float
    offers: tuple[types_pb2.TransportOffer, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes to move."""
        return len(self.page_ids) * self.layout.page_bytes


def encode_ticket(ticket: Ticket) -> types_pb2.Handoff:
    """Return the message."""
    message = types_pb2.Handoff(
        request_id=ticket.request_id,
        attempt=ticket.attempt,
        holder_endpoint=ticket.holder_endpoint,
        holder_incarnation=ticket.holder_incarnation,
        model_fingerprint=ticket.model_fingerprint,
        layout=encode_layout(ticket.layout),
        pages=[
            types_pb2.PageRef(page_id=page_id, generation=generation)
            for page_id, generation in zip(ticket.page_ids, ticket.generations, strict=True)
        ],
        checksums=[types_pb2.LayerChecksums(page_xxh3=layer) for layer in ticket.checksums],
        num_tokens=ticket.num_tokens,
        tokens_sha256=ticket.tokens_sha256,
        first_token_id=ticket.first_token.token_id,
        sampling_state=types_pb2.SamplingState(
            seed=ticket.seed, sample_index=ticket.sample_index, position=ticket.num_tokens + 1
        ),
        transports=ticket.offers,
    )
    if ticket.lease_id:
        message.lease.lease_id = ticket.lease_id
        message.lease.duration_ms = max(round(ticket.lease_s * 1000), 1)
    if ticket.first_token.logprobs:
        message.first_token_logprobs.CopyFrom(encode_logprobs(ticket.first_token.logprobs))
    return message


def decode_ticket(message: types_pb2.Handoff) -> Ticket:
    """Return the ticket.

    Raises:
        InvalidRequestError: BAD_HANDOFF, a part is missing or contradicts another.
    """
    layout = decode_layout(message.layout)
    check_request_id(message.request_id)
    _require(message.attempt >= 1, "attempt is 0")
    _require(bool(message.holder_endpoint), "holder_endpoint is empty")
    _require(bool(message.lease.lease_id) and message.lease.duration_ms > 0, "there is no lease")
    _require(message.num_tokens >= 1, "num_tokens is 0")
    num_hash_bytes = len(message.tokens_sha256)
    _require(num_hash_bytes == _SHA256_BYTES, f"tokens_sha256 has {num_hash_bytes} bytes; is the holder an older one?")
    num_pages = layout.num_pages(message.num_tokens)
    _require(len(message.pages) == num_pages, f"{message.num_tokens} tokens take {num_pages} pages, not as listed")
    _require(len(message.checksums) == layout.num_layers, "checksums do not have one entry for each layer")
    _require(all(len(layer.page_xxh3) == num_pages for layer in message.checksums), "a layer lacks checksums")
    _require(message.sampling_state.position == message.num_tokens + 1, "the sampling position does not fit num_tokens")
    has_logprobs = message.HasField("first_token_logprobs")
    return Ticket(
        request_id=message.request_id,
        attempt=message.attempt,
        holder_endpoint=message.holder_endpoint,
        holder_incarnation=message.holder_incarnation,
        model_fingerprint=message.model_fingerprint,
        layout=layout,
        page_ids=tuple(page.page_id for page in message.pages),
        generations=tuple(page.generation for page in message.pages),
        checksums=tuple(tuple(layer.page_xxh3) for layer in message.checksums),
        num_tokens=message.num_tokens,
        tokens_sha256=message.tokens_sha256,
        first_token=SampledToken(
            message.first_token_id, decode_logprobs(message.first_token_logprobs) if has_logprobs else None
        ),
        seed=message.sampling_state.seed,
        sample_index=message.sampling_state.sample_index,
        lease_id=message.lease.lease_id,
        lease_s=message.lease.duration_ms / 1000,
        offers=tuple(message.transports),
    )


def _require(is_met: bool, problem: str) -> None:
    if not is_met:
        raise InvalidRequestError("BAD_HANDOFF", f"the ticket is not usable: {problem}")
