"""Messages that honest peers never send: real ones, spoilt in a random way, for every rpc of every service."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio
from headrace.v1 import decode_service_pb2 as decode_pb
from headrace.v1 import generation_service_pb2 as generation_pb
from headrace.v1 import hold_service_pb2 as hold_pb
from headrace.v1 import transfer_service_pb2 as transfer_pb
from headrace.v1 import types_pb2, worker_service_pb2
from headrace_core.identity import Role
from headrace_core.kv.layout import KvLayout
from headrace_core.reasons import REASONS
from headrace_core.request import hash_tokens
from headrace_core.testing.fake_model import FakeModel
from headrace_core.wire import encode_layout

from tests.rogue.stage import FINGERPRINT, PROMPT, UNHEARD, outcome

_SHARE_OF_VALUES = 0.5
_WIDTH = 32
"""Calls at a time."""
_TIMEOUT_S = 60.0
_NO_END = "no end in its minute"
_STILL_S = 5.0
_MOST_TRIES = 50
_TICK_S = 0.5
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


@dataclass(frozen=True, slots=True)
class Facts:
    """What honest callers know of the workers."""

    fingerprint: str = FINGERPRINT
    layout: KvLayout = field(default_factory=lambda: FakeModel().kv_layout(4))
    incarnation: int = 1


class Place(Protocol):
    """Where servers are."""

    @property
    def metadata(self) -> Sequence[tuple[str, str]]:
        """What an honest client sends to the router."""
        ...

    def channel(self, role: Role, server: Role) -> grpc.aio.Channel:
        """Return a channel of `role` to a `server`, with a connection of its own."""
        ...


def targets(facts: Facts = Facts()) -> list[Target]:
    """Return every rpc of ours."""
    sampling = types_pb2.SamplingParams(seed=1, max_tokens=3, temperature=0.5, stop_strings=["x"])
    sampling.logit_bias.add(token_id=3, bias=1.0)
    fingerprint, layout = facts.fingerprint, encode_layout(facts.layout)
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
        lease_key="0" * 32, incarnation=facts.incarnation, num_layers=1, num_pages=1, tokens_sha256=hash_tokens(PROMPT)
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
    cached = hold_pb.Open(holder_incarnation=facts.incarnation)
    cached.MergeFrom(opening)
    confirm = hold_pb.HoldRequest(confirm=hold_pb.Confirm())
    load = worker_service_pb2.WatchLoadRequest(min_interval_ms=50)
    service = "/headrace.v1."
    return [
        Target(service + "GenerationService/Generate", Role.CLIENT, Role.ROUTER, [generate], 1),
        Target(service + "GenerationService/GetServerInfo", Role.CLIENT, Role.ROUTER,
               [generation_pb.GetServerInfoRequest()]),
        Target(service + "DecodeService/Session", Role.ROUTER, Role.DECODE, session),
        Target(service + "HoldService/Hold", Role.DECODE, Role.PREFILL, [hold_pb.HoldRequest(open=opening), confirm]),
        Target(service + "HoldService/Hold", Role.PREFILL, Role.DECODE, [hold_pb.HoldRequest(open=cached), confirm]),
        Target(service + "TransferService/Pull", Role.DECODE, Role.PREFILL, [pull]),
        Target(service + "WorkerService/GetInfo", Role.ROUTER, Role.DECODE, [worker_service_pb2.GetInfoRequest()]),
        Target(service + "WorkerService/WatchLoad", Role.OPERATOR, Role.PREFILL, [load], 1),
        # An operator's would be obeyed, whatever else it says: the message has no fields.
        Target(service + "WorkerService/Drain", Role.ROUTER, Role.DECODE, [worker_service_pb2.DrainRequest()]),
    ]  # fmt: skip


def _of_its_own(message: Any, die: random.Random) -> Any:
    """Return `message` for a session or a sequence of its own: calls beside each other would end each other's."""
    if not isinstance(message, decode_pb.SessionRequest | hold_pb.HoldRequest) or not message.HasField("open"):
        return message
    own = type(message)()
    own.CopyFrom(message)
    own.open.router_id = die.getrandbits(63) | 1
    return own


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


async def flood(at: Place, target: Target, num_messages: int, seed: int = 1) -> Counter[str]:
    """Send so many spoilt messages to one rpc, each in a call of its own; return what became of the calls."""
    die, outcomes = random.Random(seed), Counter[str]()
    left = iter(range(num_messages))
    clock = _Clock()
    ticking = asyncio.create_task(clock.run())
    async with at.channel(target.caller, target.server) as channel:
        await asyncio.gather(*(_lane(at, channel, target, die, left, outcomes, clock) for _ in range(_WIDTH)))
    ticking.cancel()
    return outcomes


def problems(outcomes: Counter[str]) -> list[str]:
    """Return the outcomes that are none: an error of ours, a call without an end, a refusal without a reason."""
    bad = {code.name for code in grpc.StatusCode} - _BARE - {"DEADLINE_EXCEEDED"}
    bad |= {reason for error, reasons in REASONS.items() if error.status == "INTERNAL" for reason in reasons}
    return [name for name in outcomes if name in bad or name in ("still open", _NO_END, UNHEARD)]


async def _lane(
    at: Place,
    channel: grpc.aio.Channel,
    target: Target,
    die: random.Random,
    left: Iterator[int],
    outcomes: Counter[str],
    clock: _Clock,
) -> None:
    metadata = at.metadata if target.server is Role.ROUTER else ()
    for _ in left:
        honest = [_of_its_own(message, die) for message in target.honest[: die.randint(1, len(target.honest))]]
        messages = [*(message.SerializeToString() for message in honest[:-1]), spoil(honest[-1], die)]
        outcomes[await _send(channel, target, messages, metadata, clock)] += 1


async def _send(
    channel: grpc.aio.Channel,
    target: Target,
    messages: Sequence[bytes],
    metadata: Sequence[tuple[str, str]],
    clock: _Clock,
) -> str:
    """Return what became of a call with these messages.

    It is made again if this machine stood still meanwhile, or if what became of it was not to be heard.
    """
    for _ in range(_MOST_TRIES):
        began_s = time.monotonic()
        if len(messages) == 1:
            call = channel.unary_stream(target.method)(messages[0], timeout=_TIMEOUT_S, metadata=metadata)
        else:
            call = channel.stream_stream(target.method)(_all(messages), timeout=_TIMEOUT_S, metadata=metadata)
        became = await outcome(call, most=target.most_answers, timeout_s=2 * _TIMEOUT_S)
        is_late = time.monotonic() - began_s > _TIMEOUT_S - 1.0
        if not is_late and became != UNHEARD:
            return became
        if is_late and not clock.stood_still_since(began_s):
            return _NO_END
    return UNHEARD


class _Clock:
    """Sees when this process has not run for long: then every call's time is up, and no server is to blame."""

    def __init__(self) -> None:
        self._ticked_s = time.monotonic()
        self._stood_still_s = float("-inf")

    def stood_still_since(self, began_s: float) -> bool:
        """Return whether it did."""
        self._look()
        return self._stood_still_s >= began_s

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._look()
            await asyncio.sleep(_TICK_S)

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._ticked_s > _STILL_S:
            self._stood_still_s = now_s
        self._ticked_s = now_s


async def _all(messages: Sequence[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message
    await asyncio.sleep(_PAUSE_S)  # what a caller says last is heard before it leaves


_PAUSE_S = 0.01
