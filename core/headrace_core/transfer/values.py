"""What is said about a hand-off, as values: what is wanted, who has it, which pages are sealed, the first token.

Each is a message of hold_service.proto, whose fields are meant; decoding checks what a message says by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.v1 import decode_service_pb2, types_pb2
from headrace.v1 import hold_service_pb2 as pb

from headrace_core.batch.spec import SequenceSpec
from headrace_core.errors import HandoffLostError, InvalidRequestError, ProtocolError, TransferCorruptError
from headrace_core.kv.layout import KvLayout
from headrace_core.request import MOST_TIMEOUT_S, FinishReason, SampledToken, hash_tokens
from headrace_core.wire import (
    decode_finish,
    decode_layout,
    decode_logprobs,
    decode_sampling,
    encode_finish,
    encode_layout,
    encode_logprobs,
    encode_sampling,
)

_MOST_SHARDS = 1024
_MOST_LAYERS = 1 << 16

Owner = tuple[int, int]
"""Whose a sequence is: the router's identity and its number there."""


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """`CachedPrefix`: who may have the first `num_tokens` of a sequence in its prefix cache."""

    address: str
    incarnation: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Order:
    """`Open`: one sequence that is wanted, and until when; with `holder_incarnation` only what that process has.

    `cached`: where the holder may find the first of its tokens.
    """

    owner: Owner
    spec: SequenceSpec
    timeout_s: float
    tokens_sha256: bytes
    fingerprint: str
    layout: KvLayout
    num_have_tokens: int = 0
    """The first of the sequence's, in full pages that the taker has."""
    cached: CachedPrefix | None = None
    holder_incarnation: int | None = None
    taker: str = ""
    """Whom the certificate of the call names that ordered it: not said, but seen. Empty without TLS."""
    traceparent: str = ""
    """The taker's span; empty if the sequence is not traced."""

    @property
    def num_have_pages(self) -> int:
        """Pages that are not wanted."""
        return self.num_have_tokens // self.layout.page_size


@dataclass(frozen=True, slots=True)
class Run:
    """`Run`: pages `first_page` ... of a sequence in layers `first_layer` ..., which nothing writes any more.

    `checksums` are xxh3-64 of each page's bytes, [layers][pages]; `page_ids` and `generations` are the holder's.
    """

    first_layer: int
    first_page: int
    page_ids: tuple[int, ...]
    generations: tuple[int, ...]
    checksums: tuple[tuple[int, ...], ...]

    @property
    def num_layers(self) -> int:
        """Layers it spans."""
        return len(self.checksums)

    @property
    def num_pages(self) -> int:
        """Pages it has in each of them."""
        return len(self.page_ids)

    def covers(self, *, first_layer: int, num_layers: int, first_page: int, num_pages: int) -> bool:
        """Return whether these pages of these layers are all in it."""
        layers = self.first_layer <= first_layer <= first_layer + num_layers <= self.first_layer + self.num_layers
        pages = self.first_page <= first_page <= first_page + num_pages <= self.first_page + self.num_pages
        return layers and pages and num_layers > 0 and num_pages > 0

    def layers(self, first_layer: int, num_layers: int) -> Run | None:
        """Return the part of it that lies in these layers; None if there is none."""
        start = max(first_layer, self.first_layer)
        end = min(first_layer + num_layers, self.first_layer + self.num_layers)
        if start >= end:
            return None
        sums = self.checksums[start - self.first_layer : end - self.first_layer]
        return Run(start, self.first_page, self.page_ids, self.generations, sums)


@dataclass(frozen=True, slots=True)
class Shard:
    """`Shard`: a part of the holder, and the layers of every page that it has."""

    endpoint: str
    incarnation: int
    first_layer: int
    num_layers: int
    offers: tuple[types_pb2.TransportOffer, ...]


@dataclass(frozen=True, slots=True)
class Admission:
    """`Admitted`: who computes the sequence, and where its pages can be read."""

    fingerprint: str
    layout: KvLayout
    lease_key: str
    num_cached_tokens: int
    queue_s: float
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class FirstToken:
    """`Last`: the prompt is computed; with `finish` the sequence is over already."""

    num_tokens: int
    tokens_sha256: bytes
    token: SampledToken
    seed: int
    sample_index: int
    finish: FinishReason | None
    compute_s: float


def encode_order(order: Order) -> pb.Open:
    """Return the message."""
    spec = order.spec
    return pb.Open(
        router_id=order.owner[0],
        sequence_number=order.owner[1],
        attempt=spec.attempt,
        request_id=spec.request_id,
        timeout_ms=max(round(order.timeout_s * 1000), 1),
        token_ids=spec.token_ids,
        num_prompt_tokens=spec.num_prompt_tokens,
        tokens_sha256=order.tokens_sha256,
        sampling=encode_sampling(spec.params),
        sample_index=spec.sample_index,
        model_fingerprint=order.fingerprint,
        layout=encode_layout(order.layout),
        num_have_tokens=order.num_have_tokens,
        cached_prefix=encode_cached(order.cached) if order.cached else None,
        holder_incarnation=order.holder_incarnation,
        traceparent=order.traceparent,
    )


def encode_cached(cached: CachedPrefix) -> types_pb2.CachedPrefix:
    """Return the message."""
    return types_pb2.CachedPrefix(address=cached.address, incarnation=cached.incarnation, num_tokens=cached.num_tokens)


def decode_cached(message: pb.Open | decode_service_pb2.StartSequence) -> CachedPrefix | None:
    """Return the value in a message that may have one: a hint, so what makes no sense is none."""
    cached = message.cached_prefix
    if not cached.address or not cached.num_tokens:
        return None
    return CachedPrefix(cached.address, cached.incarnation, cached.num_tokens)


def decode_order(message: pb.Open) -> Order:
    """Return the value; the sequence itself is checked by whoever knows the model.

    Raises:
        InvalidRequestError: BAD_REQUEST, BAD_SAMPLING, BAD_HANDOFF, the taker has pages that can't be.
        TransferCorruptError: TOKENS_MISMATCH, the hash is not that of the tokens beside it.
    """
    if not message.router_id or not message.timeout_ms:
        raise InvalidRequestError("BAD_REQUEST", "an order names its router and the time it has")
    token_ids = list(message.token_ids)
    if message.tokens_sha256 != hash_tokens(token_ids):
        raise TransferCorruptError("TOKENS_MISMATCH", "the order's hash is not that of its tokens; is its taker older?")
    layout, num_have = decode_layout(message.layout), message.num_have_tokens
    if num_have > len(token_ids) or num_have % layout.page_size:
        problem = f"the taker has {num_have} of {len(token_ids)} tokens, in pages of {layout.page_size}"
        raise InvalidRequestError("BAD_HANDOFF", problem)
    return Order(
        owner=(message.router_id, message.sequence_number),
        spec=SequenceSpec(
            request_id=message.request_id,
            attempt=message.attempt,
            sample_index=message.sample_index,
            token_ids=token_ids,
            num_prompt_tokens=message.num_prompt_tokens,
            params=decode_sampling(message.sampling),
        ),
        timeout_s=timeout_s(message.timeout_ms),
        tokens_sha256=message.tokens_sha256,
        fingerprint=message.model_fingerprint,
        layout=layout,
        num_have_tokens=num_have,
        cached=decode_cached(message),
        holder_incarnation=message.holder_incarnation if message.HasField("holder_incarnation") else None,
        traceparent=message.traceparent,
    )


def encode_run(run: Run) -> pb.Run:
    """Return the message."""
    return pb.Run(
        first_layer=run.first_layer,
        first_page=run.first_page,
        pages=[
            types_pb2.PageRef(page_id=page_id, generation=generation)
            for page_id, generation in zip(run.page_ids, run.generations, strict=True)
        ],
        checksums=[types_pb2.LayerChecksums(page_xxh3=layer) for layer in run.checksums],
    )


def decode_run(message: pb.Run) -> Run:
    """Return the value.

    Raises:
        ProtocolError: PROTOCOL, it contradicts itself.
    """
    num_pages = len(message.pages)
    _require(num_pages > 0 and len(message.checksums) > 0, "a run of nothing")
    _require(all(len(layer.page_xxh3) == num_pages for layer in message.checksums), "a run whose layer lacks checksums")
    return Run(
        first_layer=message.first_layer,
        first_page=message.first_page,
        page_ids=tuple(page.page_id for page in message.pages),
        generations=tuple(page.generation for page in message.pages),
        checksums=tuple(tuple(layer.page_xxh3) for layer in message.checksums),
    )


def encode_admission(admission: Admission) -> pb.Admitted:
    """Return the message."""
    return pb.Admitted(
        model_fingerprint=admission.fingerprint,
        layout=encode_layout(admission.layout),
        lease_key=admission.lease_key,
        num_cached_tokens=admission.num_cached_tokens,
        queue_us=round(admission.queue_s * 1e6),
        shards=[
            pb.Shard(
                rank=rank,
                endpoint=shard.endpoint,
                incarnation=shard.incarnation,
                first_layer=shard.first_layer,
                num_layers=shard.num_layers,
                transports=shard.offers,
            )
            for rank, shard in enumerate(admission.shards)
        ],
    )


def decode_admission(message: pb.Admitted) -> Admission:
    """Return the value.

    Raises:
        ProtocolError: PROTOCOL, a part is missing, or the shards are not the whole of each page.
    """
    try:
        layout = decode_layout(message.layout)
    except InvalidRequestError as error:
        raise ProtocolError("PROTOCOL", f"its cache layout is not usable: {error}") from error
    _require(bool(message.lease_key), "an admission without a lease")
    _require(0 < len(message.shards) <= _MOST_SHARDS, f"an admission of {len(message.shards)} shards")
    next_layer = 0
    for rank, shard in enumerate(message.shards):
        _require(shard.rank == rank and bool(shard.endpoint), "shards out of order, or without an endpoint")
        _require(not (shard.first_head or shard.num_heads), "shards of heads, which this version does not take")
        _require(shard.first_layer == next_layer and 0 < shard.num_layers <= _MOST_LAYERS, "shards with gaps")
        next_layer += shard.num_layers
    _require(next_layer == layout.num_layers, "shards that are not the whole of a page")
    return Admission(
        fingerprint=message.model_fingerprint,
        layout=layout,
        lease_key=message.lease_key,
        num_cached_tokens=message.num_cached_tokens,
        queue_s=message.queue_us / 1e6,
        shards=tuple(
            Shard(shard.endpoint, shard.incarnation, shard.first_layer, shard.num_layers, tuple(shard.transports))
            for shard in message.shards
        ),
    )


def encode_first(first: FirstToken) -> pb.Last:
    """Return the message."""
    logprobs = first.token.logprobs
    return pb.Last(
        num_tokens=first.num_tokens,
        tokens_sha256=first.tokens_sha256,
        token_id=first.token.token_id,
        logprobs=encode_logprobs(logprobs) if logprobs else None,
        sampling_state=types_pb2.SamplingState(
            seed=first.seed, sample_index=first.sample_index, position=first.num_tokens + 1
        ),
        finish_reason=encode_finish(first.finish),
        compute_us=round(first.compute_s * 1e6),
    )


def decode_first(message: pb.Last) -> FirstToken:
    """Return the value.

    Raises:
        ProtocolError: PROTOCOL.
    """
    _require(message.sampling_state.position == message.num_tokens + 1, "a sampling position that fits no token")
    return FirstToken(
        num_tokens=message.num_tokens,
        tokens_sha256=message.tokens_sha256,
        token=SampledToken(
            message.token_id, decode_logprobs(message.logprobs) if message.HasField("logprobs") else None
        ),
        seed=message.sampling_state.seed,
        sample_index=message.sampling_state.sample_index,
        finish=decode_finish(message.finish_reason),
        compute_s=message.compute_us / 1e6,
    )


def check_first(first: FirstToken, order: Order, vocab_size: int) -> None:
    """Check that the first token is that of the sequence which was ordered.

    What passes is filed in the prefix cache under `order.spec.token_ids`, and later requests compute on it.

    Raises:
        InvalidRequestError: BAD_HANDOFF, it is for something else.
        TransferCorruptError: TOKENS_MISMATCH, other tokens were computed.
        ProtocolError: PROTOCOL, it can't be a token of this sequence.
    """
    spec = order.spec
    pairs: dict[str, tuple[object, object]] = {
        "num_tokens": (first.num_tokens, len(spec.token_ids)),
        "seed": (first.seed, spec.params.seed),
        "sample_index": (first.sample_index, spec.sample_index),
    }
    other = [name for name, (answered, asked) in pairs.items() if answered != asked]
    if other:
        raise InvalidRequestError("BAD_HANDOFF", f"the prefill worker answered for another {', '.join(other)}")
    if first.tokens_sha256 != order.tokens_sha256:
        raise TransferCorruptError("TOKENS_MISMATCH", "the prefill worker computed other tokens than it was asked to")
    if not 0 <= first.token.token_id < vocab_size:
        raise ProtocolError("PROTOCOL", f"the first token is {first.token.token_id}; the vocabulary has {vocab_size}")
    if spec.params.top_logprobs is not None and first.token.logprobs is None:
        raise ProtocolError("PROTOCOL", "the first token has no log-probability")


def stale_attempt(attempt: int, current: int) -> HandoffLostError:
    """Return what an attempt is told that comes too late."""
    return HandoffLostError("STALE_ATTEMPT", f"attempt {attempt} comes after attempt {current}")


def replaced(attempt: int) -> HandoffLostError:
    """Return what an attempt is told when another one takes its place."""
    return HandoffLostError("STALE_ATTEMPT", f"attempt {attempt} replaced this one")


def timeout_s(timeout_ms: int) -> float:
    """Return a sequence's time in seconds, of which clocks and timers can make something, whatever a peer sent."""
    return min(timeout_ms / 1000, MOST_TIMEOUT_S)


def num_bytes(runs: Sequence[Run], layout: KvLayout) -> int:
    """Return the bytes of these runs."""
    return sum(run.num_layers * run.num_pages for run in runs) * layout.page_layer_bytes


def _require(is_met: bool, problem: str) -> None:
    if not is_met:
        raise ProtocolError("PROTOCOL", f"a holder sent {problem}")
