"""Messages that honest peers never send: real ones, spoilt in a random way, for every rpc of every service."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from headrace.v1 import decode_service_pb2 as decode_pb
from headrace.v1 import generation_service_pb2 as generation_pb
from headrace.v1 import hold_service_pb2 as hold_pb
from headrace.v1 import transfer_service_pb2 as transfer_pb
from headrace.v1 import types_pb2, worker_service_pb2
from headrace_core.identity import Role
from headrace_core.request import hash_tokens
from headrace_core.testing.fake_model import FakeModel
from headrace_core.wire import encode_layout

from tests.rogue.stage import FINGERPRINT, PROMPT, Stage, outcome

_SHARE_OF_VALUES = 0.5
_WIDTH = 32
"""Calls at a time."""
_TIMEOUT_S = 60.0
_BARE = {"RESOURCE_EXHAUSTED"}
"""gRPC's own word for a message that is too large."""


@dataclass(frozen=True, slots=True)
class Target:
    """One rpc: who calls it at whom, and what honest callers send, in order."""

    method: str
    caller: Role
    server: Role
    honest: Sequence[Any]
    most_answers: int = 3


def targets() -> list[Target]:
    """Return every rpc of ours."""
    sampling = types_pb2.SamplingParams(seed=1, max_tokens=3, temperature=0.5, stop_strings=["x"])
    sampling.logit_bias.add(token_id=3, bias=1.0)
    fingerprint, layout = FINGERPRINT, encode_layout(FakeModel().kv_layout(4))
    start = decode_pb.StartSequence(
        sequence_number=1, attempt=1, request_id="r", timeout_ms=2000, token_ids=PROMPT, num_prompt_tokens=len(PROMPT),
        sampling=sampling,
    )  # fmt: skip
    elsewhere = decode_pb.StartSequence(prefill_address="127.0.0.1:9")
    elsewhere.MergeFrom(start)
    opening = hold_pb.Open(
        router_id=1, sequence_number=1, attempt=1, request_id="r", timeout_ms=2000, token_ids=PROMPT,
        num_prompt_tokens=len(PROMPT), tokens_sha256=hash_tokens(PROMPT), sampling=sampling, layout=layout,
        model_fingerprint=fingerprint,
    )  # fmt: skip
    pull = transfer_pb.PullRequest(
        lease_key="0" * 32, incarnation=1, num_layers=1, num_pages=1, tokens_sha256=hash_tokens(PROMPT)
    )
    generate = generation_pb.GenerateRequest(
        request_id="r", tokens=generation_pb.TokenPrompt(token_ids=PROMPT), sampling=sampling, n=2
    )
    session = [
        decode_pb.SessionRequest(open=decode_pb.OpenSession(router_id=7)),
        decode_pb.SessionRequest(start=start),
        decode_pb.SessionRequest(cancel=decode_pb.CancelSequence(sequence_number=1, attempt=1)),
        decode_pb.SessionRequest(start=elsewhere),
    ]
    holding = [hold_pb.HoldRequest(open=opening), hold_pb.HoldRequest(confirm=hold_pb.Confirm())]
    load = worker_service_pb2.WatchLoadRequest(min_interval_ms=50)
    service = "/headrace.v1."
    return [
        Target(service + "GenerationService/Generate", Role.CLIENT, Role.ROUTER, [generate], 1),
        Target(service + "GenerationService/GetServerInfo", Role.CLIENT, Role.ROUTER,
               [generation_pb.GetServerInfoRequest()]),
        Target(service + "DecodeService/Session", Role.ROUTER, Role.DECODE, session),
        Target(service + "HoldService/Hold", Role.DECODE, Role.PREFILL, holding),
        Target(service + "HoldService/Hold", Role.PREFILL, Role.DECODE, holding),
        Target(service + "TransferService/Pull", Role.DECODE, Role.PREFILL, [pull]),
        Target(service + "WorkerService/GetInfo", Role.ROUTER, Role.DECODE, [worker_service_pb2.GetInfoRequest()]),
        Target(service + "WorkerService/WatchLoad", Role.OPERATOR, Role.PREFILL, [load], 1),
        # An operator's would be obeyed, whatever else it says: the message has no fields.
        Target(service + "WorkerService/Drain", Role.ROUTER, Role.DECODE, [worker_service_pb2.DrainRequest()]),
    ]  # fmt: skip


def spoil(message: Any, die: random.Random) -> bytes:
    """Return `message` with another value in one of its fields, or with bytes spoilt in one to three ways."""
    if die.random() < _SHARE_OF_VALUES:
        changed = type(message)()
        changed.CopyFrom(message)
        if _change(changed, die):
            return changed.SerializeToString()
    spoilt = bytearray(message.SerializeToString())
    for _ in range(die.randint(1, 3)):
        die.choice(_WAYS)(spoilt, die)
    return bytes(spoilt)


def _change(message: Any, die: random.Random) -> bool:
    """Give a field of `message`, or of a message in it, a value that no honest peer gives; return False without one."""
    fields = [field for field, _ in message.ListFields()]
    if not fields:
        return False
    field = die.choice(fields)
    value = getattr(message, field.name)
    if field.type == field.TYPE_MESSAGE:
        return _change(die.choice(value) if field.is_repeated else value, die)
    if field.is_repeated:
        del value[: die.randint(0, len(value))]
        value.extend([_extreme(field, die)] * die.choice((0, 1, 1000)))
    else:
        setattr(message, field.name, _extreme(field, die))
    return True


def _extreme(field: Any, die: random.Random) -> Any:
    if field.type == field.TYPE_STRING:
        return die.choice(("", "\0", "a" * 300, "\u202e../../etc/passwd\n", "127.0.0.1:1", "[::]:0"))
    if field.type == field.TYPE_BYTES:
        return die.randbytes(die.choice((0, 1, 31, 32, 33, 1000)))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return die.choice((float("nan"), float("inf"), float("-inf"), -0.0, 1e38, -1.0))
    if field.type == field.TYPE_BOOL:
        return die.random() < 0.5
    if field.type in (field.TYPE_UINT64, field.TYPE_FIXED64):
        return die.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1))
    return die.choice((0, 1, 96, 97, 2**16, 2**31 - 1))


def _flip(spoilt: bytearray, die: random.Random) -> None:
    if spoilt:
        spoilt[die.randrange(len(spoilt))] ^= 1 << die.randrange(8)


def _cut(spoilt: bytearray, die: random.Random) -> None:
    del spoilt[die.randint(0, len(spoilt)) :]


def _insert(spoilt: bytearray, die: random.Random) -> None:
    place = die.randint(0, len(spoilt))
    spoilt[place:place] = die.randbytes(die.choice((1, 2, 8, 64)))


def _repeat(spoilt: bytearray, die: random.Random) -> None:
    start = die.randint(0, len(spoilt))
    spoilt += spoilt[start : start + die.randint(0, 64)] * die.choice((1, 2, 50))


def _large_number(spoilt: bytearray, die: random.Random) -> None:
    place = die.randint(0, len(spoilt))
    spoilt[place : place + 1] = b"\xff" * die.randint(1, 9) + b"\x01"


def _field(spoilt: bytearray, die: random.Random) -> None:
    """A field that is there is said once more, with another value."""
    number, kind = die.randint(1, 20), die.choice((0, 1, 2, 5))
    value = {0: b"\x00", 1: die.randbytes(8), 2: b"\x02" + die.randbytes(2), 5: die.randbytes(4)}[kind]
    spoilt += bytes(((number << 3 | kind) & 0x7F,)) + value


_WAYS: Sequence[Callable[[bytearray, random.Random], None]] = (_flip, _cut, _insert, _repeat, _large_number, _field)


async def flood(at: Stage, target: Target, num_messages: int, seed: int = 1) -> Counter[str]:
    """Send so many spoilt messages to one rpc, each in a call of its own; return what became of the calls."""
    die, outcomes = random.Random(seed), Counter[str]()
    left = iter(range(num_messages))
    async with at.channel(target.caller, target.server) as channel:
        await asyncio.gather(*(_lane(at, channel, target, die, left, outcomes) for _ in range(_WIDTH)))
    return outcomes


def problems(outcomes: Counter[str]) -> list[str]:
    """Return the outcomes that are none: an error of ours, a call without an end, a refusal without a reason."""
    codes = {code.name for code in grpc.StatusCode} - _BARE
    return [name for name in outcomes if name in ("BUG", "still open") or name in codes - {"DEADLINE_EXCEEDED"}]


async def _lane(
    at: Stage,
    channel: grpc.aio.Channel,
    target: Target,
    die: random.Random,
    left: Iterator[int],
    outcomes: Counter[str],
) -> None:
    metadata = at.metadata if target.server is Role.ROUTER else ()
    for _ in left:
        spoilt_one = die.randrange(len(target.honest))
        honest = [message.SerializeToString() for message in target.honest[:spoilt_one]]
        messages = [*honest, spoil(target.honest[spoilt_one], die)]
        if len(messages) == 1:
            call = channel.unary_stream(target.method)(messages[0], timeout=_TIMEOUT_S, metadata=metadata)
        else:
            call = channel.stream_stream(target.method)(_all(messages), timeout=_TIMEOUT_S, metadata=metadata)
        outcomes[await outcome(call, most=target.most_answers)] += 1


async def _all(messages: Sequence[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message
    await asyncio.sleep(_PAUSE_S)  # what a caller says last is heard before it leaves


_PAUSE_S = 0.01
