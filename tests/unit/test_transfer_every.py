"""What holds for every transport of the table: whole and verified, or an error, and never a byte too late."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest
from headrace_core.errors import HandoffLostError, TransferCorruptError
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.transfer.transport import offer_name
from headrace_core.transfer.transports import TRANSPORTS

from tests.unit.transport_parts import PAGES, PLACES, of_other_bytes, pair

every_transport = pytest.mark.parametrize("name", sorted(name for name, it in TRANSPORTS.items() if not it.probe()))


@every_transport
@async_test
async def test_every_page_of_every_layer_arrives_in_its_place(name: str):
    async with pair(name) as it:
        untouched = it.memory.content([0, 3, 4, 5, 6])
        held = it.source.content(range(8))
        await it.move()
        assert it.memory.content(PLACES) == it.source.content(PAGES)
        assert it.memory.content([0, 3, 4, 5, 6]) == untouched
        assert it.source.content(range(8)) == held
        assert it.memory.copies == [("from_host", PLACES, range(len(it.memory.host_layers())))]


@every_transport
@async_test
async def test_the_offer_is_of_its_name_and_proven_again_at_no_cost(name: str):
    async with pair(name) as it:
        assert offer_name(it.holder.offer()) == name
        await it.taker.prove(it.offered())
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            await it.taker.prove(it.offered())
        assert len(os.listdir("/proc/self/fd")) <= before  # others' may still be closing


@every_transport
@pytest.mark.parametrize(("layer", "index"), [(0, 0), (1, 2)])
@async_test
async def test_other_bytes_than_were_sealed_are_never_accepted(name: str, layer: int, index: int):
    async with pair(name) as it:
        with pytest.raises(TransferCorruptError) as raised:
            await it.move(of_other_bytes(it.run(), layer=layer, index=index))
        assert raised.value.reason == "CHECKSUM"
        assert f"page {index} of layer {layer} from {it.address}" in str(raised.value)
        assert it.memory.copies == []


@every_transport
@async_test
async def test_a_page_written_anew_after_it_was_sealed_is_never_accepted(name: str):
    async with pair(name) as it:
        run = it.run()
        it.source.page_bytes(1, PAGES[1])[5] ^= 1
        with pytest.raises(TransferCorruptError):
            await it.move(run)
        assert it.memory.copies == []


@every_transport
@async_test
async def test_part_of_the_layers_can_be_taken_alone(name: str):
    async with pair(name) as it:
        before = it.memory.content(PLACES)
        part = it.run().layers(1, 1)
        assert part is not None
        await it.move(part)
        assert it.memory.content(PLACES) == [before[0], it.source.content(PAGES)[1]]
        assert it.memory.copies == [("from_host", PLACES, range(1, 2))]


@every_transport
@async_test
async def test_a_move_that_is_given_up_while_it_waits_for_its_turn_is_drained_when_it_ends(name: str):
    async with pair(name) as it:
        may_verify = threading.Event()
        it.verifying.submit(may_verify.wait, WAIT_S)
        moving = asyncio.ensure_future(it.move())
        await eventually(lambda: it.verifying._work_queue.qsize() > 0, "it waits to be verified")
        moving.cancel()
        done, _ = await asyncio.wait([moving], timeout=0.05)
        assert not done, "a thread can't be stopped: the pages are not free yet"
        may_verify.set()
        await asyncio.wait([moving])
        assert moving.cancelled()
        left = it.memory.content(PLACES)
        await asyncio.sleep(0)
        assert it.memory.content(PLACES) == left
        await it.move()
        assert it.memory.content(PLACES) == it.source.content(PAGES)


@every_transport
@pytest.mark.parametrize("how", ["disconnect", "close"])
@async_test
async def test_after_a_connection_is_torn_down_the_next_one_is_made_anew(name: str, how: str):
    async with pair(name) as it:
        await it.move()
        await (it.taker.disconnect(it.address) if how == "disconnect" else it.taker.close())
        it.memory.page_bytes(0, 1)[:] = bytes(64)
        await it.move()
        assert it.memory.content(PLACES) == it.source.content(PAGES)


@every_transport
@async_test
async def test_a_holder_that_is_gone_is_an_error_whatever_was_proven(name: str):
    async with pair(name) as it:
        source = it.offered()
        await it.taker.prove(source)
        it.holder.close()
        await it.taker.disconnect(it.address)
        if name == "grpc":
            return  # its end is the server's, which is tested by itself
        with pytest.raises(HandoffLostError) as raised:
            await it.mover.move(it.taker, source, it.run(), PLACES)
        assert raised.value.reason == "HOLDER_LOST"


@every_transport
@async_test
async def test_many_runs_at_once_are_each_in_its_place(name: str):
    async with pair(name) as it:
        parts = [it.run().layers(layer, 1) for layer in (0, 1)] * 8
        await asyncio.gather(*(it.move(part) for part in parts))
        assert it.memory.content(PLACES) == it.source.content(PAGES)
        if name == "shm":
            assert it.taker.endpoints == [it.address], "one pool is mapped, whoever was first"
            await eventually(lambda: it.holder.server.num_connections == 1, "the others' connections have ended")
