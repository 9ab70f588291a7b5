"""Pages over a real connection: whole and in order or an error that names the holder, and never a byte too late."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from headrace.v1 import transfer_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace_core.errors import (
    HandoffLostError,
    HeadraceError,
    TransferCorruptError,
    UnavailableError,
)
from headrace_core.request import hash_tokens
from headrace_core.rpc import Server
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.testing.handoff_parts import INCARNATION, PlainMemory, StubHolder, holding, run_of
from headrace_core.transfer.grpc import SERVICE, GrpcHolder, GrpcTaker
from headrace_core.transfer.transport import Reading, Source, Transfer, offer_name

PAGES = (5, 0, 3)
PLACES = (1, 2, 7)
NUM_BYTES = 2 * 3 * 64
READING = Reading("lease-1", INCARNATION, hash_tokens(range(12)))


class Ends:
    """Both ends of a connection: a holder that serves, and a transport that takes into `memory`."""

    def __init__(self, holder: StubHolder, *, frame_bytes: int = 100, address: str = "127.0.0.1:1") -> None:
        self.holder = holder
        self.source = PlainMemory(seed=1)
        self.memory = PlainMemory(seed=2)
        self.sent: list[float] = []
        served = holding(holder, self.source, frame_bytes=frame_bytes, on_sent=self.sent.append)
        self.service = GrpcHolder(served)
        self.transport = GrpcTaker(self.memory)
        self.address = address

    def offered(self) -> Source:
        return Source(self.address, READING, self.service.offer())

    def begin(self, page_ids: tuple[int, ...] = PAGES, timeout_s: float = WAIT_S) -> Transfer:
        run = run_of(self.source, page_ids)
        return self.transport.pull(self.offered(), run, PLACES[: len(page_ids)], timeout_s=timeout_s)

    async def pull(self, timeout_s: float = WAIT_S) -> None:
        await self.begin(timeout_s=timeout_s).wait()


@contextlib.asynccontextmanager
async def ends(holder: StubHolder | None = None, *, frame_bytes: int = 100) -> AsyncGenerator[Ends]:
    it = Ends(holder or StubHolder(PAGES), frame_bytes=frame_bytes)
    server = Server([SERVICE])
    it.service.serve(server.grpc)
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
        assert it.sent == sizes


@pytest.mark.parametrize("first_page", [0, 4])
@async_test
async def test_the_run_is_looked_at_before_every_frame_and_after_the_last(first_page: int):
    async with ends() as it:
        run = replace(run_of(it.source, PAGES), first_page=first_page)
        await it.transport.pull(it.offered(), run, PLACES, timeout_s=WAIT_S).wait()
        assert it.holder.looks == [(READING, (0, 2, first_page, 3))] * (1 + 4 + 1)


@pytest.mark.parametrize("num_good_looks", [0, 1, 3, 5])
@async_test
async def test_a_lease_that_ends_at_any_time_ends_the_pull_in_the_holders_words(num_good_looks: int):
    lost = HandoffLostError("LEASE_ENDED", "lease-1 is not held")
    async with ends(StubHolder(PAGES, error=lost, num_good_looks=num_good_looks)) as it:
        error = await failure(it.pull())
        assert isinstance(error, HandoffLostError)
        assert (error.reason, str(error)) == ("LEASE_ENDED", "lease-1 is not held")
        assert len(it.sent) == max(num_good_looks - 1, 0)


@async_test
async def test_layers_are_sent_from_the_first_one_asked_for():
    async with ends() as it, grpc.aio.insecure_channel(it.address) as channel:
        request = pb.PullRequest(lease_key="lease-1", incarnation=INCARNATION, first_layer=1, num_layers=1, num_pages=3)
        call = channel.unary_stream(f"/{SERVICE}/Pull")(request.SerializeToString(), timeout=WAIT_S)
        got = b"".join([pb.PullResponse.FromString(frame).payload async for frame in call])
        assert got == b"".join(it.source.content(PAGES)[1])


@async_test
async def test_fewer_bytes_than_the_run_has_are_a_short_read():
    async with ends(StubHolder(PAGES[:2])) as it:
        error = await failure(it.pull())
        assert isinstance(error, TransferCorruptError)
        assert (error.reason, str(error)) == ("SHORT_READ", "256 of 384 bytes arrived before the stream ended")


@async_test
async def test_more_bytes_than_the_run_has_are_a_short_read():
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

        handlers = {
            "Pull": grpc.unary_stream_rpc_method_handler(pull),
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


@pytest.mark.parametrize("how", ["cancel", "disconnect", "close"])
@async_test
async def test_after_a_transfer_is_drained_no_byte_lands(how: str):
    async with stalled() as (it, holder):
        transfer = it.begin()
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
        transfer = it.begin((0,))
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
        transfer = it.begin()
        await transfer.drained()
        transfer.cancel()
        assert (await failure(transfer.wait())).reason == "STALE_PAGE"


@async_test
async def test_one_connection_serves_every_call_and_is_made_again_after_a_disconnect():
    async with ends() as it:
        connections = it.transport.connections
        await it.pull()
        async with connections.use(it.address) as first:
            await it.pull()
        await it.transport.disconnect("127.0.0.1:9")
        assert connections.endpoints == [it.address]
        await it.transport.disconnect(it.address)
        assert connections.endpoints == []
        await it.pull()
        async with connections.use(it.address) as second:
            assert second is not first
        await it.transport.close()
        assert connections.endpoints == []


def test_the_offer_says_how_long_frames_are():
    service = GrpcHolder(holding(StubHolder(()), PlainMemory(), frame_bytes=4096, on_sent=lambda _: None))
    assert service.offer() == types_pb2.TransportOffer(grpc=types_pb2.GrpcTransport(frame_bytes=4096))
    assert offer_name(service.offer()) == "grpc"
    assert offer_name(types_pb2.TransportOffer()) == ""
