"""Pages read in place: only by who can prove it, only of the holder that offered them, and not once it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from headrace.v1 import types_pb2
from headrace_core.errors import HandoffLostError, StartupError, TransferCorruptError
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.testing.handoff_parts import INCARNATION, PlainMemory, StubHolder, holding
from headrace_core.transfer import shm, unix
from headrace_core.transfer.memfd import Memfd
from headrace_core.transfer.shm import ShmHolder, ShmTransfer
from headrace_core.transfer.transport import Reading, Source, UnprovenError
from headrace_core.transfer.unix import DescriptorServer, receive_descriptor

from tests.unit.transport_parts import PAGES, PLACES, READING, Pair, pair


async def refusal(it: Pair, source: Source) -> str:
    with pytest.raises(UnprovenError) as raised:
        await it.taker.prove(source)
    assert it.taker.endpoints == []
    return str(raised.value)


def other_incarnation(source: Source) -> Source:
    return Source(source.endpoint, Reading("lease-1", INCARNATION + 1, b""), source.offer)


def in_folder(name: str) -> str:
    return f"{unix.private_folder()}/{name}"


OFFERS = {
    "another machine": (lambda it: setattr(it.shm, "host", "1" * 36), "it is on another machine"),
    "no machine": (lambda it: it.shm.ClearField("host"), "it is on another machine"),
    "nobody there": (lambda it: setattr(it.shm, "socket", in_folder("nobody.sock")), "No such file"),
    "no path": (lambda it: setattr(it.shm, "socket", ""), "folder for sockets"),
    "a path too long": (lambda it: setattr(it.shm, "socket", in_folder("a" * 200)), "too long"),
    "somebody else's socket": (lambda it: setattr(it.shm, "socket", "/run/docker.sock"), "folder for sockets"),
    "a way out": (lambda it: setattr(it.shm, "socket", in_folder("../a.sock")), "folder for sockets"),
    "other key": (lambda it: setattr(it.shm, "key", b"k" * 16), "passes no memory to us"),
    "no key": (lambda it: it.shm.ClearField("key"), "passes no memory to us"),
    "other proof": (lambda it: setattr(it.shm, "proof", b"p" * 16), "not that holder's pool"),
    "no proof": (lambda it: it.shm.ClearField("proof"), "not that holder's pool"),
}


@pytest.mark.parametrize("name", OFFERS)
@async_test
async def test_what_does_not_prove_itself_is_not_read(name: str):
    change, problem = OFFERS[name]
    async with pair("shm") as it:
        assert problem in await refusal(it, it.offered(change))


@async_test
async def test_an_earlier_process_is_not_read():
    async with pair("shm") as it:
        assert "passes no memory to us" in await refusal(it, other_incarnation(it.offered()))


@async_test
async def test_a_user_who_is_not_ours_is_not_let_in(monkeypatch):
    async with pair("shm") as it:
        monkeypatch.setattr(unix, "peer_uid", lambda connection: os.geteuid() + 1)
        await refusal(it, it.offered())


@async_test
async def test_a_pool_on_plain_memory_is_not_offered_and_who_asks_is_told_at_once(monkeypatch):
    monkeypatch.setattr(unix, "PATIENCE_S", 2 * WAIT_S)
    holder = ShmHolder(holding(StubHolder(PAGES), PlainMemory(), frame_bytes=100, on_sent=lambda _: None))
    holder.serve(None)
    assert holder.offer() is None
    with pytest.raises(ConnectionError, match="passes no memory to us"):
        await receive_descriptor(holder.server.path, b"", timeout_s=WAIT_S)
    holder.close()


@async_test
async def test_a_pool_is_offered_once_it_is_served_with_secrets_that_are_new_each_time():
    secrets: set[bytes] = set()
    for _ in range(2):
        it = Pair("shm")
        assert it.holder.offer() is None
        it.holder.close()
        it.holder.serve(None)
        offer = it.holder.offer().shm
        assert (len(offer.key), len(offer.proof)) == (16, 16)
        secrets |= {offer.key, offer.proof}
        it.holder.close()
    assert len(secrets) == 4


@async_test
async def test_a_worker_that_can_listen_nowhere_does_not_start(monkeypatch):
    monkeypatch.setattr(unix.tempfile, "gettempdir", lambda: "/nowhere")
    with pytest.raises(StartupError, match=r"^shm: no socket can be listened at: .*'/nowhere/headrace-") as raised:
        Pair("shm").holder.serve(None)
    assert raised.value.reason == "NO_TRANSPORT"


@async_test
async def test_who_listens_and_never_answers_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(shm, "PROOF_TIMEOUT_S", 0.05)
    async with pair("shm") as it:
        path = in_folder(f"mute-{os.getpid()}.new")
        with unix._new_socket() as mute:
            mute.bind(path)
            mute.listen()
            source = it.offered(lambda offer: setattr(offer.shm, "socket", path))
            assert await refusal(it, source) == f"nobody answers at {path}"
        os.unlink(path)


@pytest.mark.parametrize("is_sealed", [False, True], ids=["size not sealed", "another pool"])
@async_test
async def test_what_a_rogue_passes_at_the_holders_path_is_not_mapped(is_sealed: bool):
    """One of this user's own that has even heard the key: reading memory whose size changes would kill the worker."""
    async with pair("shm") as it:
        offer = it.holder.offer().shm
        it.holder.close()
        if is_sealed:
            rogue = Memfd()
            rogue.allocate(2, 512)
            descriptor = os.dup(rogue.descriptor)
        else:
            descriptor = os.memfd_create("rogue", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, 1 << 20)
        password = offer.key + INCARNATION.to_bytes(8, "little")
        server = DescriptorServer(f"{os.getpid()}-{INCARNATION:016x}", password, lambda: descriptor)
        assert server.path == offer.socket
        source = Source(it.address, READING, types_pb2.TransportOffer(shm=offer))
        problem = "not that holder's pool" if is_sealed else "not sealed"
        assert problem in await refusal(it, source)
        server.close()
        os.close(descriptor)


def transfer_of(it: Pair, source: Source, *page_ids: int) -> ShmTransfer:
    run = replace(it.run(), page_ids=page_ids)
    return it.taker.pull(source, run, page_ids, timeout_s=WAIT_S)


@pytest.mark.parametrize(
    ("stride", "layer", "page_id", "is_there"),
    [
        (512, 0, 7, True),
        (512, 0, 8, False),
        (4096, 1, 63, True),
        (4096, 1, 64, False),
        (4096, 0, 1 << 31, False),
        (4128, 1, 63, False),
        (1 << 62, 1, 0, False),
        (32, 0, 0, False),
    ],
)
@async_test
async def test_a_page_that_is_not_whole_in_its_layer_and_in_the_pool_is_a_short_read(stride, layer, page_id, is_there):
    """The pool has two layers of 4096 bytes, a page 64: what a holder says of it is not taken for granted."""
    async with pair("shm") as it:
        source = it.offered(lambda offer: setattr(offer.shm, "layer_stride", stride))
        await it.taker.prove(source)
        read = await transfer_of(it, source, 0, page_id).wait()
        if is_there:
            assert len(read(layer, 1)) == 64
            return
        with pytest.raises(TransferCorruptError) as raised:
            read(layer, 1)
        assert (raised.value.reason, str(raised.value)) == (
            "SHORT_READ",
            f"page {page_id} is outside {it.address}'s pool",
        )


@async_test
async def test_a_connection_that_ends_just_before_a_page_is_read_leaves_none_to_read(monkeypatch):
    async with pair("shm") as it:
        source = it.offered()
        await it.taker.prove(source)
        transfer = transfer_of(it, source, 0)
        read = await transfer.wait()
        await it.taker.disconnect(it.address)
        monkeypatch.setattr(transfer, "_require_open", lambda: None)  # the reading thread was past it
        with pytest.raises(TransferCorruptError):
            read(0, 0)


@async_test
async def test_a_holder_restarted_at_the_same_path_is_another_one():
    async with pair("shm") as it:
        first = it.offered()
        await it.taker.prove(first)
        it.holder.close()
        second = ShmHolder(it.holder._holding)
        second.serve(None)
        offer = second.offer()
        assert offer is not None
        assert offer.shm.socket == first.offer.shm.socket
        await eventually(lambda: it.taker.endpoints == [], "the first one's end is known")
        with pytest.raises(HandoffLostError, match=f"^{it.address} is gone"):
            transfer_of(it, first, 0)
        assert "passes no memory to us" in await refusal(it, first)
        await it.taker.prove(Source(it.address, READING, offer))
        second.close()


@async_test
async def test_nothing_is_left_when_both_have_closed():
    def open_now() -> tuple[int, int, int]:
        maps = Path("/proc/self/maps").read_text().count("headrace-pages")
        return len(os.listdir("/proc/self/fd")), maps, threading.active_count()

    gc.collect()
    before = open_now()
    for _ in range(3):
        async with pair("shm") as it:
            await it.move()
            path = it.holder.server.path
        assert not exists(path)
    del it
    gc.collect()
    # grpc's own threads and descriptors stay as they are after the first server.
    middle = open_now()
    assert middle[1] == before[1]
    async with pair("shm") as it:
        await it.move()
    del it
    gc.collect()
    after = open_now()
    assert after[0] <= middle[0]  # others' may still be closing
    assert after[1] == middle[1]


def exists(path: str) -> bool:
    return Path(path).exists()


class Paused(PlainMemory):
    """The taker's memory, whose copying stops before one page until it is let go on."""

    def __init__(self, page_bytes: int) -> None:
        super().__init__(seed=2, page_bytes=page_bytes)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def page_bytes(self, layer: int, page_id: int) -> memoryview:
        if (layer, page_id) == (1, PLACES[0]):
            self.reached.set()
            assert self.go_on.wait(WAIT_S)
        return super().page_bytes(layer, page_id)


@async_test
async def test_a_holder_that_is_killed_in_mid_copy_is_lost_and_what_it_leaves_does_no_harm():
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "headrace_core.testing.lone_holder", "shm", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        encoded = bytes.fromhex((await process.stdout.readline()).decode())
        it = Pair("shm")
        run = it.run()
        it.memory = Paused(64)
        it.mover = type(it.mover)(it.memory, it.verifying, WAIT_S, WAIT_S)
        source = Source("held", READING, types_pb2.TransportOffer.FromString(encoded))
        await it.taker.prove(source)
        untouched = it.memory.content(PLACES)
        moving = asyncio.ensure_future(it.mover.move(it.taker, source, run, PLACES))
        await asyncio.to_thread(it.memory.reached.wait, WAIT_S)
        process.kill()
        await eventually(lambda: it.taker.endpoints == [], "its end is seen")
        it.memory.go_on.set()
        with pytest.raises(HandoffLostError) as raised:
            await moving
        assert raised.value.reason == "HOLDER_LOST"
        assert it.memory.content(PLACES)[0] != untouched[0], "the first layer was copied before"
        assert it.memory.content(PLACES)[1] == untouched[1]
        assert it.memory.copies == [], "nothing of it is computed with"
        with pytest.raises(UnprovenError, match="Connection refused"):
            await it.taker.prove(source)
        path = source.offer.shm.socket
        assert exists(path)
        async with pair("shm"):
            assert not exists(path), "the next holder sweeps it away"
        it.verifying.shutdown()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("how", ["cancel", "disconnect", "close"])
@async_test
async def test_a_copy_under_way_stops_at_its_next_page(how: str):
    async with pair("shm") as it:
        it.memory = Paused(64)
        it.mover = type(it.mover)(it.memory, it.verifying, WAIT_S, WAIT_S)
        untouched = it.memory.content(PLACES)
        moving = asyncio.ensure_future(it.move())
        await asyncio.to_thread(it.memory.reached.wait, WAIT_S)
        if how == "cancel":
            moving.cancel()
        elif how == "disconnect":
            await it.taker.disconnect(it.address)
        else:
            await it.taker.close()
        it.memory.go_on.set()
        await asyncio.wait([moving])
        if how == "cancel":
            assert moving.cancelled()
            return
        assert it.memory.content(PLACES)[1] == untouched[1]
        assert it.memory.copies == []
        with pytest.raises(HandoffLostError, match="torn down"):
            moving.result()


def test_what_speaks_against_it_here_is_said(monkeypatch):
    assert shm.probe() == ""
    monkeypatch.setattr(shm, "_BOOT_ID", Path("/nowhere/boot_id"))
    assert "/nowhere/boot_id" in shm.probe()
    monkeypatch.undo()
    monkeypatch.delattr(os, "memfd_create")
    assert shm.probe().startswith("no memory can be shared here")
