"""Pages over a real connection: whole and in order or an error that names the holder, and never a byte too late."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable

import grpc
import grpc.aio
import pytest
from headrace.v1 import transfer_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace_core.errors import (
    DeadlineError,
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    LayoutMismatchError,
    TransferCorruptError,
    UnavailableError,
)
from headrace_core.request import hash_tokens
from headrace_core.rpc import Server
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.testing.handoff_parts import INCARNATION, PlainMemory, StubHolder, ticket_for
from headrace_core.transfer.fake import fake_offer
from headrace_core.transfer.grpc import SERVICE, GrpcHolder, GrpcTransport
from headrace_core.transfer.ticket import Ticket
from headrace_core.transfer.transport import offer_name
from headrace_core.transfer.transports import choose_transport

PAGES = (5, 0, 3)
PLACES = (1, 2, 7)
NUM_BYTES = 2 * 3 * 64
LOOK = ("lease-1", 3, INCARNATION, hash_tokens(range(12)))


class Ends:
    """Both ends of a connection: a holder that serves, and a transport that takes into `memory`."""

    def __init__(self, holder: StubHolder, *, frame_bytes: int = 100, address: str = "127.0.0.1:1") -> None:
        self.holder = holder
        self.source = PlainMemory(seed=1)
        self.memory = PlainMemory(seed=2)
        self.sent: list[float] = []
        self.service = GrpcHolder(
            lambda: self.holder, lambda: self.source, frame_bytes=frame_bytes, on_sent=self.sent.append
        )
        self.transport = GrpcTransport(self.memory)
        self.address = address

    def ticket(self, num_layers: int = 2, page_ids: tuple[int, ...] = PAGES) -> Ticket:
        return ticket_for(self.source, page_ids, endpoint=self.address, num_layers=num_layers)

    async def pull(self, ticket: Ticket | None = None, timeout_s: float = WAIT_S) -> None:
        await self.transport.pull(ticket or self.ticket(), PLACES, timeout_s=timeout_s).wait()


@contextlib.asynccontextmanager
async def ends(holder: StubHolder | None = None, *, frame_bytes: int = 100) -> AsyncGenerator[Ends]:
    it = Ends(holder or StubHolder(PAGES), frame_bytes=frame_bytes)
    server = Server([SERVICE])
    it.service.add_to(server.grpc)
    it.address = server.bind("127.0.0.1:0")
    await server.start()
    try:
        yield it
    finally:
        await it.transport.close()
        await server.stop(0)


async def failure(call: Awaitable[object]) -> HeadraceError:
    with pytest.raises(HeadraceError) as raised:
        await call
    return raised.value


@pytest.mark.parametrize(
    ("frame_bytes", "sizes"),
    [(100, [100, 100, 100, 84]), (64, [64] * 6), (1000, [NUM_BYTES]), (NUM_BYTES, [NUM_BYTES])],
)
@async_test
async def test_every_page_of_every_layer_arrives_in_its_place(frame_bytes: int, sizes: list[int]):
    async with ends(frame_bytes=frame_bytes) as it:
        untouched = it.memory.content([0, 3, 4, 5, 6])
        await it.pull()
        assert it.memory.content(PLACES) == it.source.content(PAGES)
        assert it.memory.content([0, 3, 4, 5, 6]) == untouched
        assert it.sent == [size + (2 if size < 128 else 3) for size in sizes]


@async_test
async def test_the_lease_is_looked_at_before_every_frame_and_after_the_last():
    async with ends() as it:
        await it.pull()
        assert it.holder.looks == [LOOK] * (1 + 4 + 1)


@pytest.mark.parametrize("num_good_looks", [0, 1, 3, 5])
@async_test
async def test_a_lease_that_ends_at_any_time_ends_the_pull_in_the_holders_words(num_good_looks: int):
    lost = HandoffLostError("LEASE_EXPIRED", "lease-1 is not held")
    async with ends(StubHolder(PAGES, error=lost, num_good_looks=num_good_looks)) as it:
        error = await failure(it.pull())
        assert isinstance(error, HandoffLostError)
        assert (error.reason, str(error)) == ("LEASE_EXPIRED", "lease-1 is not held")
        assert len(it.sent) == max(num_good_looks - 1, 0)


@async_test
async def test_a_layer_that_is_not_there_is_the_tickets_fault():
    async with ends() as it:
        error = await failure(it.pull(it.ticket(num_layers=3)))
        assert isinstance(error, InvalidRequestError)
        assert error.reason == "BAD_HANDOFF"
        assert "no such layer" in str(error)
        assert it.sent == []


@async_test
async def test_layers_are_sent_from_the_first_one_asked_for():
    async with ends() as it, grpc.aio.insecure_channel(it.address) as channel:
        request = pb.PullRequest(
            lease_id="lease-1", attempt=3, holder_incarnation=INCARNATION, first_layer=1, num_layers=1
        )
        call = channel.unary_stream(f"/{SERVICE}/Pull")(request.SerializeToString(), timeout=WAIT_S)
        got = b"".join([pb.PullResponse.FromString(frame).payload async for frame in call])
        assert got == b"".join(it.source.content(PAGES)[1])


@async_test
async def test_fewer_bytes_than_the_ticket_promises_are_a_short_read():
    async with ends(StubHolder(PAGES[:2])) as it:
        error = await failure(it.pull())
        assert isinstance(error, TransferCorruptError)
        assert (error.reason, str(error)) == ("SHORT_READ", "256 of 384 bytes arrived before the stream ended")


@async_test
async def test_more_bytes_than_the_ticket_promises_are_a_short_read():
    async with ends(StubHolder((*PAGES, 6))) as it:
        error = await failure(it.pull())
        assert isinstance(error, TransferCorruptError)
        assert str(error) == "more than the 384 bytes promised arrived"


@async_test
async def test_a_holder_that_is_gone_is_named():
    it = Ends(StubHolder(PAGES), address="127.0.0.1:9")
    error = await failure(it.pull())
    assert isinstance(error, HandoffLostError)
    assert error.reason == "HOLDER_LOST"
    assert str(error).startswith("127.0.0.1:9 did not deliver: UNAVAILABLE: ")
    await it.transport.close()


@async_test
async def test_a_holder_that_is_not_ready_is_lost_to_this_hand_off():
    async with ends(StubHolder(PAGES, error=UnavailableError("STARTING", "the model is loading"))) as it:
        error = await failure(it.pull())
        assert isinstance(error, HandoffLostError)
        assert error.reason == "HOLDER_LOST"
        assert str(error) == f"{it.address} did not deliver: STARTING: the model is loading"


class Stalled(StubHolder):
    """A server that sends one frame, and the next only when told; it answers nothing else before."""

    def __init__(self) -> None:
        super().__init__(PAGES)
        self.gate = asyncio.Event()
        self.has_sent = asyncio.Event()

    def add_to(self, server: grpc.aio.Server) -> None:
        async def pull(request: bytes, context: object):
            yield pb.PullResponse(payload=bytes(64)).SerializeToString()
            self.has_sent.set()
            await self.gate.wait()
            yield pb.PullResponse(payload=bytes(64)).SerializeToString()

        async def answer(request: bytes, context: object) -> bytes:
            await self.gate.wait()
            return b""

        handlers = {
            "Pull": grpc.unary_stream_rpc_method_handler(pull),
            "RenewLease": grpc.unary_unary_rpc_method_handler(answer),
            "ReleaseLease": grpc.unary_unary_rpc_method_handler(answer),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


@contextlib.asynccontextmanager
async def stalled() -> AsyncGenerator[tuple[Ends, Stalled]]:
    holder = Stalled()
    server = grpc.aio.server()
    holder.add_to(server)
    it = Ends(holder, address=f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    try:
        yield it, holder
    finally:
        await it.transport.close()
        await server.stop(0)


def arrived(it: Ends) -> bool:
    """Return whether the first page has been written: it is all zeros then."""
    return not any(it.memory.page_bytes(0, PLACES[0]))


@async_test
async def test_a_pull_that_takes_too_long_is_lost():
    async with stalled() as (it, _):
        error = await failure(it.pull(timeout_s=0.2))
        assert isinstance(error, HandoffLostError)
        assert error.reason == "HOLDER_LOST"
        assert "DEADLINE_EXCEEDED" in str(error)


@pytest.mark.parametrize("call", ["renew", "release"])
@async_test
async def test_a_holder_that_does_not_answer_is_asked_only_so_long(call: str):
    async with stalled() as (it, _):
        error = await failure(getattr(it.transport, call)(it.ticket(), timeout_s=0.2))
        assert isinstance(error, DeadlineError)


@pytest.mark.parametrize("how", ["cancel", "disconnect", "close"])
@async_test
async def test_after_a_transfer_is_drained_no_byte_lands(how: str):
    async with stalled() as (it, holder):
        transfer = it.transport.pull(it.ticket(), PLACES, timeout_s=WAIT_S)
        await eventually(lambda: arrived(it), "the first page is there")
        if how == "cancel":
            transfer.cancel()
        elif how == "disconnect":
            await it.transport.disconnect(it.address)
        else:
            await it.transport.close()
        await transfer.drained()
        left = it.memory.content(PLACES)
        holder.gate.set()
        error = await failure(transfer.wait())
        assert isinstance(error, HandoffLostError)
        assert (error.reason, str(error)) == ("HOLDER_LOST", "the connection to the holder was torn down")
        assert it.memory.content(PLACES) == left


@async_test
async def test_giving_up_the_wait_does_not_stop_the_transfer():
    async with stalled() as (it, holder):
        transfer = it.transport.pull(it.ticket(page_ids=(0,)), (1,), timeout_s=WAIT_S)
        waiting = asyncio.ensure_future(transfer.wait())
        await holder.has_sent.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        holder.gate.set()
        await transfer.wait()
        await transfer.drained()
        assert it.memory.content([1]) == [[bytes(64)], [bytes(64)]]


@async_test
async def test_a_failed_transfer_is_drained_without_a_word_and_tells_who_waits():
    async with ends(StubHolder(PAGES, error=HandoffLostError("STALE_PAGE", "reused"))) as it:
        transfer = it.transport.pull(it.ticket(), PLACES, timeout_s=WAIT_S)
        await transfer.drained()
        transfer.cancel()
        assert (await failure(transfer.wait())).reason == "STALE_PAGE"


@pytest.mark.parametrize(("lease_s", "answer_s"), [(30.0, 30.0), (0.0123, 0.012), (0.0001, 0.001)])
@async_test
async def test_renewing_tells_for_how_long(lease_s: float, answer_s: float):
    async with ends(StubHolder(PAGES, lease_s=lease_s)) as it:
        assert await it.transport.renew(it.ticket(), timeout_s=WAIT_S) == answer_s
        assert it.holder.renewed == [("lease-1", INCARNATION)]


@async_test
async def test_releasing_ends_the_lease_of_the_ticket():
    async with ends() as it:
        await it.transport.release(it.ticket(), timeout_s=WAIT_S)
        assert it.holder.released == [("lease-1", INCARNATION)]
        assert it.holder.renewed == []


@pytest.mark.parametrize("call", ["renew", "release"])
@async_test
async def test_what_the_holder_says_to_renewing_and_releasing_is_passed_on(call: str):
    async with ends(StubHolder(PAGES, error=HandoffLostError("WORKER_RESTARTED", "another process"))) as it:
        error = await failure(getattr(it.transport, call)(it.ticket(), timeout_s=WAIT_S))
        assert isinstance(error, HandoffLostError)
        assert (error.reason, str(error)) == ("WORKER_RESTARTED", "another process")


@pytest.mark.parametrize("call", ["renew", "release"])
@async_test
async def test_a_holder_that_can_not_be_asked_is_unavailable(call: str):
    it = Ends(StubHolder(PAGES), address="127.0.0.1:9")
    error = await failure(getattr(it.transport, call)(it.ticket(), timeout_s=WAIT_S))
    assert isinstance(error, UnavailableError)
    await it.transport.close()


@async_test
async def test_one_connection_serves_every_call_and_is_made_again_after_a_disconnect():
    async with ends() as it:
        connections = it.transport.connections
        await it.transport.renew(it.ticket(), timeout_s=WAIT_S)
        with connections.use(it.address) as first:
            await it.pull()
        await it.transport.disconnect("127.0.0.1:9")
        assert connections.endpoints == [it.address]
        await it.transport.disconnect(it.address)
        assert connections.endpoints == []
        await it.transport.renew(it.ticket(), timeout_s=WAIT_S)
        assert len(it.holder.renewed) == 2
        with connections.use(it.address) as second:
            assert second is not first
        await it.transport.close()
        assert connections.endpoints == []


def test_the_offer_says_how_long_frames_are():
    service = GrpcHolder(lambda: StubHolder(()), PlainMemory, frame_bytes=4096, on_sent=lambda _: None)
    assert service.offer() == types_pb2.TransportOffer(grpc=types_pb2.GrpcTransport(frame_bytes=4096))
    assert offer_name(service.offer()) == "grpc"
    assert offer_name(types_pb2.TransportOffer()) == ""


GRPC = types_pb2.TransportOffer(grpc=types_pb2.GrpcTransport(frame_bytes=1))


@pytest.mark.parametrize(
    ("offers", "usable", "chosen"),
    [
        ([GRPC, fake_offer("x")], {"grpc", "fake"}, "grpc"),
        ([fake_offer("x"), GRPC], {"grpc", "fake"}, "fake"),
        ([fake_offer("x"), GRPC], {"grpc"}, "grpc"),
        ([types_pb2.TransportOffer(), GRPC], {"grpc"}, "grpc"),
    ],
)
def test_the_first_offer_that_this_worker_can_use_is_taken(offers, usable, chosen):
    ticket = ticket_for(PlainMemory(), PAGES, offers=offers)
    assert choose_transport(ticket, frozenset(usable)) == chosen


@pytest.mark.parametrize(
    ("offers", "offered"),
    [([], "nothing"), ([types_pb2.TransportOffer()], "nothing"), ([GRPC, fake_offer("x")], "grpc, fake")],
)
def test_without_a_common_transport_both_sides_are_told(offers, offered):
    ticket = ticket_for(PlainMemory(), PAGES, endpoint="10.0.0.7:5000", offers=offers)
    with pytest.raises(LayoutMismatchError) as raised:
        choose_transport(ticket, frozenset({"rdma", "memory"}))
    assert raised.value.reason == "NO_COMMON_TRANSPORT"
    assert str(raised.value) == f"10.0.0.7:5000 offers {offered}; this worker takes memory, rdma"
