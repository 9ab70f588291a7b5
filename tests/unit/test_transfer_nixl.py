"""One-sided reads that nothing can stop: pages are free when their transfer is over, or its connection destroyed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from headrace.v1 import types_pb2
from headrace_core.errors import HandoffLostError
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.transfer import nixl
from headrace_core.transfer.transport import Source, UnprovenError

from tests.unit.transport_parts import PAGES, PLACES, READING, Pair, pair

pytestmark = pytest.mark.skipif(bool(nixl.probe()), reason=nixl.probe())

OFFERS = {
    "no agent": lambda it: it.nixl.ClearField("metadata"),
    "garbage": lambda it: setattr(it.nixl, "metadata", b"garbage" * 20),
    "cut": lambda it: setattr(it.nixl, "metadata", it.nixl.metadata[:-9]),
    "other proof": lambda it: setattr(it.nixl, "proof", b"p" * 16),
    "memory that is not registered": lambda it: setattr(it.nixl, "proof_address", 4096),
}


@pytest.mark.parametrize("change", OFFERS.values(), ids=OFFERS)
@async_test
async def test_what_does_not_prove_itself_is_not_read(change):
    async with pair("nixl") as it:
        with pytest.raises(UnprovenError):
            await it.taker.prove(it.offered(change))
        await it.move()
        assert it.memory.content(PLACES) == it.source.content(PAGES)


@pytest.mark.parametrize("page_id", [9, 1 << 40])
@async_test
async def test_a_page_that_is_not_in_the_pool_is_not_read(page_id: int):
    async with pair("nixl") as it:
        run = it.run()
        object.__setattr__(run, "page_ids", (0, page_id, 0))
        with pytest.raises(HandoffLostError):
            await it.move(run)
        await it.move()


class Endless:
    """Keeps a link's transfers under way until told otherwise, as when the holder's machine says nothing any more."""

    def __init__(self, it: Pair) -> None:
        (self.link,) = it.taker._links.values()
        self.num_asked, self.is_over = 0, False
        is_done = self.link.is_done

        def ask(handle: object) -> bool:
            self.num_asked += 1
            return self.is_over and is_done(handle)

        self.link.is_done = ask


@async_test
async def test_a_transfer_that_is_given_up_keeps_its_pages_until_it_is_over():
    async with pair("nixl") as it:
        await it.move()
        endless = Endless(it)
        transfer = it.taker.pull(it.offered(), it.run(), PLACES, timeout_s=60)
        await eventually(lambda: endless.num_asked > 0, "it is under way")
        transfer.cancel()
        draining = asyncio.ensure_future(transfer.drained())
        asked = endless.num_asked
        await eventually(lambda: endless.num_asked > asked + 3, "it is asked again and again")
        assert not draining.done()
        endless.is_over = True
        await draining


@async_test
async def test_a_transfer_that_never_ends_costs_its_connection_and_only_that():
    async with pair("nixl") as it:
        await it.move()
        endless = Endless(it)
        it.mover = type(it.mover)(it.memory, it.verifying, 0.05, 0.05)
        with pytest.raises(HandoffLostError, match="took too long"):
            await it.move()
        assert endless.link._agent.nixl is None, "its agent is destroyed"
        it.mover = type(it.mover)(it.memory, it.verifying, 60, 60)
        await it.move()
        assert it.memory.content(PLACES) == it.source.content(PAGES)


@async_test
async def test_a_proof_that_is_given_up_leaves_no_agent(monkeypatch):
    async with pair("nixl") as it:
        made: list[nixl._Link] = []

        def never(link: nixl._Link, handle: object) -> bool:
            made.append(link)
            return False

        monkeypatch.setattr(nixl._Link, "is_done", never)
        proving = asyncio.ensure_future(it.taker.prove(it.offered()))
        await eventually(lambda: len(made) > 2, "it is asked again and again")
        proving.cancel()
        await asyncio.wait([proving])
        assert proving.cancelled()
        assert made[0]._agent.nixl is None


@async_test
async def test_agents_are_never_of_the_same_name():
    async with pair("nixl") as first, pair("nixl") as second:
        for it in (first, second):
            await it.move()
        agents = [it.holder._agent for it in (first, second)]
        agents += [link._agent for it in (first, second) for link in it.taker._links.values()]
        assert len({agent.nixl.name for agent in agents}) == 4


def state_of(process: asyncio.subprocess.Process) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextlib.asynccontextmanager
async def lone_holder() -> AsyncGenerator[tuple[asyncio.subprocess.Process, Pair, Source]]:
    """Run a holder in a process of its own, with the same pages as the pair's."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "headrace_core.testing.lone_holder", "nixl", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    it = Pair("nixl")
    try:
        offer = types_pb2.TransportOffer.FromString(bytes.fromhex((await process.stdout.readline()).decode()))
        source = Source("held", READING, offer)
        await it.taker.prove(source)
        await it.mover.move(it.taker, source, it.run(), PLACES)
        yield process, it, source
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await it.taker.close()
        it.verifying.shutdown()


@async_test
async def test_a_holder_that_is_killed_is_lost():
    async with lone_holder() as (process, it, source):
        process.kill()
        await process.wait()
        with pytest.raises(HandoffLostError) as raised:
            await it.mover.move(it.taker, source, it.run(), PLACES)
        assert raised.value.reason == "HOLDER_LOST"
        with pytest.raises(UnprovenError):
            await it.taker.prove(source)


@async_test
async def test_a_stopped_holder_over_tcp_costs_its_connection_and_no_byte_lands_afterwards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp")
        async with lone_holder() as (process, it, source):
            patient = it.mover
            it.mover = type(it.mover)(it.memory, it.verifying, 0.2, 0.2)
            for layer in it.memory.host_layers():
                layer[:] = bytes(len(layer))
            process.send_signal(signal.SIGSTOP)
            await eventually(lambda: state_of(process) == "T", "it has stopped")
            with pytest.raises(HandoffLostError, match="took too long"):
                await it.mover.move(it.taker, source, it.run(), PLACES)
            left = it.memory.content(PLACES)
            process.send_signal(signal.SIGCONT)
            await it.taker.prove(source)
            assert it.memory.content(PLACES) == left
            await patient.move(it.taker, source, it.run(), PLACES)
            assert it.memory.content(PLACES) == it.source.content(PAGES)


@async_test
async def test_nothing_is_left_when_both_have_closed():
    async def once() -> tuple[int, int]:
        async with pair("nixl") as it:
            await it.move()
        del it
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    first = await once()
    for _ in range(3):
        last = await once()
    assert last[0] <= first[0]  # others' may still be closing
    assert last[1] <= first[1]
