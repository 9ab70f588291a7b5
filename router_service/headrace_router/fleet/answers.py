"""What a worker may answer: checked where it arrives, so that nothing behind has to doubt it.

A worker is another process, maybe of another version, maybe broken. What it sends is judged like a client's request:
bytes that are no message, values that can't be, parts that are missing. Each is a `ProtocolError` that says what was
sent; what it costs is the business of the caller (a link, an attempt), and never more than that worker.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2
from headrace.v1 import decode_service_pb2, types_pb2, worker_service_pb2
from headrace.v1.types_pb2 import WORKER_ROLE_BOTH, WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL, WorkerRole
from headrace_core.errors import InvalidRequestError, ProtocolError, TransferCorruptError
from headrace_core.kv.layout import KvLayout
from headrace_core.request import MAX_COUNT, MAX_EOS_TOKEN_IDS, MAX_TOP_LOGPROBS
from headrace_core.wire import decode_layout

ROLE_NAMES: dict[WorkerRole.ValueType, str] = {
    WORKER_ROLE_PREFILL: "prefill",
    WORKER_ROLE_DECODE: "decode",
    WORKER_ROLE_BOTH: "both",
}

_FINGERPRINT = re.compile(r"[0-9a-f]{8,128}")
_REASON = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
_MOST_PAGE_TOKENS = 1 << 16
_MOST_TRANSPORTS = 16
_MOST_PAGE_HASHES = 1 << 16
_LAST_CODE = max(code.value[0] for code in grpc.StatusCode)
_SIDES = frozenset(
    (
        decode_service_pb2.FAILURE_SIDE_DECODE,
        decode_service_pb2.FAILURE_SIDE_PREFILL,
        decode_service_pb2.FAILURE_SIDE_CHANNEL,
    )
)
_MOST_PORT = 65_535
_MOST_LOGPROB = 0.01
"""A logarithm of a probability is at most 0, but for rounding."""


def check_health(response: health_pb2.HealthCheckResponse) -> bool:
    """Check what a worker's health says; return whether it takes work.

    Raises:
        ProtocolError: PROTOCOL.
    """
    status, known = response.status, health_pb2.HealthCheckResponse
    _require(status in (known.SERVING, known.NOT_SERVING), f"its health is {status}, neither serving nor not")
    return status == known.SERVING


def check_info(info: worker_service_pb2.GetInfoResponse) -> KvLayout:
    """Check who a worker says it is; return its layout.

    Raises:
        ProtocolError: PROTOCOL.
    """
    _require(info.role in ROLE_NAMES, f"its role is {info.role}, which this router does not know")
    _require(info.incarnation != 0, "it has no incarnation")
    fingerprint = info.model_fingerprint
    _require(bool(_FINGERPRINT.fullmatch(fingerprint)), f"its model's fingerprint is {fingerprint[:80]!r}")
    try:
        layout = decode_layout(info.layout)
    except InvalidRequestError as error:
        raise ProtocolError("PROTOCOL", f"its cache layout is not usable: {error}") from error
    counts = {
        "num_pages": (info.num_pages, 1),
        "max_context_tokens": (info.max_context_tokens, 2),
        "max_step_tokens": (info.max_step_tokens, 1),
        "max_step_sequences": (info.max_step_sequences, 1),
        "vocab_size": (info.vocab_size, 1),
    }
    for name, (count, least) in counts.items():
        _require(least <= count <= MAX_COUNT, f"its {name} is {count}; it must be {least} to {MAX_COUNT}")
    num_lanes = info.num_lanes or 1
    _require(info.num_pages % num_lanes == 0, f"its {num_lanes} lanes do not share {info.num_pages} pages evenly")
    _require(info.metrics_port <= _MOST_PORT, f"its metrics are at port {info.metrics_port}")
    _require(layout.page_size <= _MOST_PAGE_TOKENS, f"its pages hold {layout.page_size} tokens")
    _require(len(info.eos_token_ids) <= MAX_EOS_TOKEN_IDS, f"it names {len(info.eos_token_ids)} end-of-sequence ids")
    _check_ids(info.eos_token_ids, info.vocab_size, "an end-of-sequence id")
    _require(len(info.transports) <= _MOST_TRANSPORTS, f"it names {len(info.transports)} transports")
    for name in info.transports:
        _require(bool(_NAME.fullmatch(name)), f"a transport of its is named {name[:80]!r}")
    return layout


def check_load(load: worker_service_pb2.WatchLoadResponse, info: worker_service_pb2.GetInfoResponse) -> None:
    """Check a load report.

    Raises:
        ProtocolError: PROTOCOL.
    """
    _require(load.num_free_pages <= info.num_pages, f"it reports {load.num_free_pages} free pages, of {info.num_pages}")
    most = load.most_free_pages
    _require(most <= load.num_free_pages, f"it reports {most} free pages for one sequence, of {load.num_free_pages}")
    for pages in (load.pages_cached, load.pages_evicted):
        _require(len(pages) <= _MOST_PAGE_HASHES, f"it reports {len(pages)} pages of its cache at once")


def check_entry(entry: decode_service_pb2.StepEntry, info: worker_service_pb2.GetInfoResponse, layout: KvLayout) -> str:
    """Check what a decode worker says of a sequence, as far as it can be judged without knowing the sequence.

    Returns what happened, by its name in `StepEntry.event`: to ask a message for it twice is seen in a token's cost.

    Raises:
        ProtocolError: PROTOCOL.
    """
    # For every token that anybody gets: each attribute of a message is read once.
    match event := entry.WhichOneof("event"):
        case "tokens":
            tokens = entry.tokens
            _check_tokens(tokens.token_ids, tokens.logprobs, info.vocab_size)
        case "prefilled":
            prefilled = entry.prefilled
            logprobs = [prefilled.logprobs] if prefilled.HasField("logprobs") else ()
            _check_tokens([prefilled.token_id], logprobs, info.vocab_size)
            num_cached = prefilled.num_cached_tokens
            _require(num_cached <= entry.position, f"{num_cached} of {entry.position} tokens were cached")
        case "joined":
            _check_joined(entry.joined, entry.position, info, layout)
        case "prompt_logprobs":
            _check_prompt_logprobs(entry.prompt_logprobs, info.vocab_size)
        case "failure":
            failure = entry.failure
            _require(1 <= failure.code <= _LAST_CODE, f"it sent a failure of code {failure.code}")
            _require(bool(_REASON.fullmatch(failure.reason)), f"it sent a failure for {failure.reason[:80]!r}")
            _require(failure.side in _SIDES, f"it sent a failure of side {failure.side}")
        case _:
            raise ProtocolError("PROTOCOL", "it sent an entry in which nothing happens")
    return event


def check_tokens_computed(prefilled: decode_service_pb2.Prefilled, tokens_sha256: bytes) -> None:
    """Check that a first token follows the tokens whose `hash_tokens` this is, and no others.

    Raises:
        TransferCorruptError: TOKENS_MISMATCH.
    """
    if prefilled.tokens_sha256 != tokens_sha256:
        raise TransferCorruptError("TOKENS_MISMATCH", "other tokens were computed than those that were asked for")


def _check_joined(
    joined: decode_service_pb2.Joined, position: int, info: worker_service_pb2.GetInfoResponse, layout: KvLayout
) -> None:
    num_pages, num_bytes = joined.num_transfer_pages, joined.transfer_bytes
    _require(num_pages <= info.num_pages, f"it took {num_pages} pages into a pool of {info.num_pages}")
    _require(num_bytes <= num_pages * layout.page_bytes, f"it moved {num_bytes} bytes for {num_pages} pages")
    hidden = joined.hidden_transfer_bytes
    _require(hidden <= num_bytes, f"it moved {hidden} of {num_bytes} bytes before the first token")
    _require(joined.transport in ("", *info.transports), f"it moved pages by {joined.transport[:80]!r}")
    num_cached = joined.num_cached_tokens
    _require(num_cached <= position, f"{num_cached} of {position} tokens were cached")


def _check_tokens(token_ids: Sequence[int], logprobs: Sequence[types_pb2.TokenLogprobs], vocab_size: int) -> None:
    if not token_ids:
        raise ProtocolError("PROTOCOL", "it sent an output without a token")
    if max(token_ids) >= vocab_size:
        _check_ids(token_ids, vocab_size, "its token")
    if logprobs:
        _check_logprobs(logprobs, vocab_size)


def _check_logprobs(logprobs: Sequence[types_pb2.TokenLogprobs], vocab_size: int) -> None:
    for entry in logprobs:
        _require(len(entry.top) <= MAX_TOP_LOGPROBS, f"it sent {len(entry.top)} log-probabilities for a position")
        _check_ids([top.token_id for top in entry.top], vocab_size, "one of its most probable tokens")
        _require(not entry.token and not any(top.token for top in entry.top), "it sent what a token stands for")
        for value in (entry.logprob, *[top.logprob for top in entry.top]):
            if not value <= _MOST_LOGPROB:  # so, and not by `>`, NaN is refused
                raise ProtocolError("PROTOCOL", f"it sent {value} as a log-probability")


def _check_prompt_logprobs(logprobs: types_pb2.PromptLogprobs, vocab_size: int) -> None:
    count, num_tops = len(logprobs.logprobs), len(logprobs.top_token_ids)
    _require(count > 0 and logprobs.first_position > 0, "it sent log-probabilities of no token of a prompt")
    is_whole = len(logprobs.ranks) == count and len(logprobs.top_logprobs) == num_tops and num_tops % count == 0
    _require(is_whole, "it sent log-probabilities of a prompt with parts missing")
    _require(not (logprobs.token_ids or logprobs.tokens or logprobs.top_tokens), "it sent what a router says of tokens")
    _require(num_tops <= count * MAX_TOP_LOGPROBS, f"it sent {num_tops} log-probabilities for {count} tokens")
    _require(1 <= min(logprobs.ranks) <= max(logprobs.ranks) <= vocab_size, "it sent a rank that there is not")
    _check_ids(logprobs.top_token_ids, vocab_size, "one of its most probable tokens")
    for values in (logprobs.logprobs, logprobs.top_logprobs):
        # Of finite numbers of float32 the sum, a double, is finite.
        if values and not (max(values) <= _MOST_LOGPROB and math.isfinite(sum(values))):
            raise ProtocolError("PROTOCOL", "it sent a log-probability that can't be")


def _check_ids(token_ids: Sequence[int], vocab_size: int, what: str) -> None:
    if token_ids and max(token_ids) >= vocab_size:
        raise ProtocolError("PROTOCOL", f"{what} is {max(token_ids)}; the vocabulary has {vocab_size}")


def _require(is_met: bool, problem: str) -> None:
    if not is_met:
        raise ProtocolError("PROTOCOL", problem)
