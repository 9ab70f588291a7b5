"""Who comes with ill intent, what refuses each, and how to take that refusal away.

A rogue is one function: it tries once, and returns "served" or the reason that it was refused with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import grpc
from headrace.v1 import transfer_service_pb2 as transfer_pb
from headrace_client.certificates import Authority
from headrace_core import door, rpc
from headrace_core.authority import ServerTls
from headrace_core.endable import EndableWait
from headrace_core.identity import CERT, KEY, ROOTS, ChannelTls, Peer, Role
from headrace_core.request import SamplingParams, hash_tokens
from headrace_core.testing.garbler import NO_MESSAGE
from headrace_core.testing.mini_taker import MiniTaker, Ordered
from headrace_core.transfer import grpc as transport
from headrace_core.transfer import hold
from headrace_core.transfer.lease import LeaseTable
from headrace_router.callers.keys import Keys
from headrace_router.testing import text_request, tokens_request

from tests.rogue.stage import PROMPT, Stage, outcome

GENERATE = "/headrace.v1.GenerationService/Generate"
SESSION = "/headrace.v1.DecodeService/Session"
_PULL, _DRAIN = "/headrace.v1.TransferService/Pull", "/headrace.v1.WorkerService/Drain"
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
_GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=4, ignore_eos=True)
_HUGE_BYTES = 40 << 20
_LEASE_S = 8.0


async def no_certificate(at: Stage) -> str:
    """Knows the authority, and has nothing that it signed."""
    roots = (at.identities / "ca.crt").read_bytes()
    tls = ChannelTls(grpc.ssl_channel_credentials(roots), "worker.headrace.internal")
    async with rpc.own_channel(at.addresses[Role.DECODE], tls=tls) as channel:
        return await outcome(channel.unary_stream("/headrace.v1.WorkerService/GetInfo")(b""))


async def expired_certificate(at: Stage) -> str:
    """A router's certificate of yesterday."""
    folder, now = at.folder / "expired", datetime.now(UTC)
    yesterday = {"since": now - timedelta(days=2), "until": now - timedelta(days=1)}
    Authority.open(at.identities).issue(folder, Peer(Role.ROUTER, "dev"), **yesterday)
    pems = [(folder / name).read_bytes() for name in (ROOTS, KEY, CERT)]
    tls = ChannelTls(grpc.ssl_channel_credentials(*pems), "worker.headrace.internal")
    async with rpc.own_channel(at.addresses[Role.DECODE], tls=tls) as channel:
        return await outcome(channel.unary_stream("/headrace.v1.WorkerService/GetInfo")(b""))


async def _asks(at: Stage, role: Role, server: Role, method: str, message: bytes, **more: Any) -> str:
    async with at.channel(role, server) as channel:
        return await outcome(channel.unary_stream(method)(message, timeout=60, **more), most=8)


async def client_opens_session(at: Stage) -> str:
    """A client's certificate, at a decode worker."""
    opening = b"\x0a\x09\x09" + (7).to_bytes(8, "little")  # OpenSession, router 7
    async with at.channel(Role.CLIENT, Role.DECODE) as channel:
        return await outcome(channel.unary_stream(SESSION)(opening))


async def client_lists_services(at: Stage) -> str:
    """A client's certificate asks the router's reflection."""
    return await _asks(at, Role.CLIENT, Role.ROUTER, _REFLECTION, b"\x3a\x00", metadata=at.metadata)


async def router_drains(at: Stage) -> str:
    """A router that was taken over sends a worker away."""
    return await _asks(at, Role.ROUTER, Role.PREFILL, _DRAIN, b"")


async def _pull(at: Stage, role: Role, ordered: Ordered) -> str:
    assert ordered.admission is not None, "it was admitted"
    (shard,), run = ordered.admission.shards, ordered.runs[0]
    request = transfer_pb.PullRequest(
        lease_key=ordered.admission.lease_key,
        incarnation=shard.incarnation,
        first_layer=0,
        num_layers=1,
        first_page=run.first_page,
        num_pages=run.num_pages,
        tokens_sha256=hash_tokens(PROMPT),
    )
    return await _asks(at, role, Role.PREFILL, _PULL, request.SerializeToString())


def _taker(at: Stage) -> MiniTaker:
    tls, asks_with = at.tls(Role.DECODE, Role.PREFILL), at.tls(Role.OPERATOR, Role.PREFILL)
    return MiniTaker(at.addresses[Role.PREFILL], tls=tls, asks_with=asks_with)


async def other_worker_reads(at: Stage) -> str:
    """A worker that knows the key of another one's lease."""
    async with _taker(at) as taker:
        ordered = taker.order("stolen", PROMPT, params=_GREEDY)
        await ordered.wait_all()
        return await _pull(at, Role.PREFILL, ordered)


async def replayed_lease(at: Stage) -> str:
    """The taker itself, when it has ended its call."""
    async with _taker(at) as taker:
        ordered = taker.order("replayed", PROMPT, params=_GREEDY)
        await ordered.wait_all()
        assert await _pull(at, Role.DECODE, ordered) == "served"
        await ordered.cancel()
        return await _pull_until_refused(at, ordered)


async def expired_lease(at: Stage) -> str:
    """The taker itself, when its sequence's time is up."""
    async with _taker(at) as taker:
        ordered = taker.order("expired", PROMPT, params=_GREEDY, timeout_s=_LEASE_S)
        await ordered.wait_all()
        await ordered.refused()
        return await _pull_until_refused(at, ordered)


async def _pull_until_refused(at: Stage, ordered: Ordered) -> str:
    until_s = time.monotonic() + at.patience_s
    while True:  # the holder may have yet to hear of it
        found = await _pull(at, Role.DECODE, ordered)
        if found != "served" or time.monotonic() > until_s:
            return found


async def no_key(at: Stage) -> str:
    """A client's certificate, and no API key."""
    return await _asks(at, Role.CLIENT, Role.ROUTER, GENERATE, tokens_request(5).SerializeToString())


async def oversized_message(at: Stage) -> str:
    """Forty megabytes."""
    tls = at.tls(Role.CLIENT, Role.ROUTER)
    options = [("grpc.max_send_message_length", -1), ("grpc.ssl_target_name_override", tls.server_name)]
    async with grpc.aio.secure_channel(at.addresses[Role.ROUTER], tls.credentials, options=options) as channel:
        request = text_request("a" * _HUGE_BYTES).SerializeToString()
        return await outcome(channel.unary_stream(GENERATE)(request, metadata=at.metadata))


async def oversized_metadata(at: Stage) -> str:
    """Sixty-four kilobytes of headers."""
    metadata = (*at.metadata, ("x-padding", "a" * (64 << 10)))
    return await _asks(at, Role.CLIENT, Role.ROUTER, "/grpc.health.v1.Health/Check", b"", metadata=metadata)


async def slow_loris(at: Stage) -> str:
    """Opens a call and sends no message."""
    async with at.channel(Role.CLIENT, Role.ROUTER) as channel:
        call = channel.stream_stream(GENERATE)(metadata=at.metadata)
        return await outcome(call, timeout_s=at.patience_s)


async def silent_connection(at: Stage) -> str:
    """Connects and does not even begin the handshake."""
    host, _, port = at.addresses[Role.DECODE].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(at.patience_s):
            return "closed" if not await reader.read(1) else "answered"
    except TimeoutError:
        return "still open"
    finally:
        writer.close()


async def no_message(at: Stage) -> str:
    """Bytes that no message has."""
    return await _asks(at, Role.CLIENT, Role.ROUTER, GENERATE, NO_MESSAGE, metadata=at.metadata)


@dataclass(frozen=True, slots=True)
class Rogue:
    """`tries` once; `guard` refuses it for one of `reasons`. `unguarded` takes that away, until its stack ends."""

    tries: Callable[[Stage], Awaitable[str]]
    reasons: tuple[str, ...]
    guard: str
    unguarded: Callable[[ExitStack], Any]


def _nobody_is_asked(stack: ExitStack) -> None:
    real = grpc.dynamic_ssl_server_credentials

    def lenient(initial: Any, newer: Any, **_: Any) -> Any:
        return real(initial, newer, require_client_authentication=False)

    stack.enter_context(mock.patch.object(grpc, "dynamic_ssl_server_credentials", lenient))
    _every_role_may(stack)  # whoever is not asked has none


def _every_role_may(stack: ExitStack) -> None:
    stack.enter_context(mock.patch.object(ServerTls, "guard", side_effect=nullcontext))


def _leases_are_anybodys(stack: ExitStack) -> None:
    for module in (hold, transport):
        stack.enter_context(mock.patch.object(module, "caller_uri", return_value=""))


class _Remembering(dict[str, Any]):
    """Finds also what was deleted."""

    def __init__(self) -> None:
        super().__init__()
        self._gone: dict[str, Any] = {}

    def __delitem__(self, key: str) -> None:
        self._gone[key] = self[key]
        super().__delitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key) or self._gone.get(key, default)


def _leases_do_not_end(stack: ExitStack) -> None:
    real = LeaseTable.__init__

    def init(self: Any, **arguments: Any) -> None:
        real(self, **arguments)
        self._by_key = _Remembering()

    stack.enter_context(mock.patch.object(LeaseTable, "__init__", init))
    stack.enter_context(mock.patch.object(LeaseTable, "_check_generations", return_value=None))


def _keys_are_not_asked_for(stack: ExitStack) -> None:
    stack.enter_context(mock.patch.object(Keys, "guard", side_effect=nullcontext))


def _server_option(*names: str, value: int) -> Callable[[ExitStack], None]:
    def patch(stack: ExitStack) -> None:
        kept = [(name, old) for name, old in rpc.SERVER_OPTIONS if name not in names]
        stack.enter_context(mock.patch.object(rpc, "SERVER_OPTIONS", [*kept, *((name, value) for name in names)]))

    return patch


def _messages_may_take_for_ever(stack: ExitStack) -> None:
    stack.enter_context(mock.patch.object(door, "EndableWait", side_effect=lambda _: EndableWait()))


def _bytes_are_not_caught(stack: ExitStack) -> None:
    stack.enter_context(mock.patch.object(rpc, "DecodeError", KeyboardInterrupt))


_METADATA = ("grpc.max_metadata_size", "grpc.absolute_max_metadata_size")
ROGUES = (
    Rogue(no_certificate, ("UNAVAILABLE",), "a certificate is asked for", _nobody_is_asked),
    Rogue(expired_certificate, ("UNAVAILABLE",), "a certificate is asked for", _nobody_is_asked),
    Rogue(client_opens_session, ("WRONG_ROLE",), "the table of roles", _every_role_may),
    Rogue(client_lists_services, ("WRONG_ROLE",), "the table of roles", _every_role_may),
    Rogue(router_drains, ("WRONG_ROLE",), "the table of roles", _every_role_may),
    Rogue(other_worker_reads, ("WRONG_TAKER",), "a lease is its taker's", _leases_are_anybodys),
    Rogue(replayed_lease, ("LEASE_ENDED",), "a lease ends with its call", _leases_do_not_end),
    Rogue(expired_lease, ("LEASE_ENDED",), "a lease ends with its call", _leases_do_not_end),
    Rogue(no_key, ("BAD_API_KEY",), "API keys", _keys_are_not_asked_for),
    Rogue(
        oversized_message,
        ("RESOURCE_EXHAUSTED",),
        "the largest message",
        _server_option("grpc.max_receive_message_length", value=-1),
    ),
    Rogue(
        oversized_metadata,
        ("RESOURCE_EXHAUSTED", "UNAVAILABLE"),
        "the most metadata",
        _server_option(*_METADATA, value=1 << 20),
    ),
    Rogue(slow_loris, ("MESSAGE_TIMEOUT",), "the time for a message", _messages_may_take_for_ever),
    Rogue(
        silent_connection,
        ("closed",),
        "the time for a handshake",
        _server_option("grpc.server_handshake_timeout_ms", value=3_600_000),
    ),
    Rogue(no_message, ("BAD_REQUEST",), "what is no message is the caller's error", _bytes_are_not_caught),
)
