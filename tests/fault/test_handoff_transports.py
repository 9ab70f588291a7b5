"""Hand-offs over each transport, and over shared memory what only a reader of memory can meet."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from headrace.v1 import decode_service_pb2
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.kv.page_pool import PageState
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.handoff_parts import StoppedCopy
from headrace_core.testing.hold_proxy import HoldProxy
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import inspect, running
from headrace_core.transfer.memory import new_memory
from headrace_core.transfer.transports import TRANSPORTS, memory_kind, usable
from headrace_core.worker.loading import LoadedModel
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True)
PROMPT = list(range(1, 23))
CHANNEL, PREFILL = decode_service_pb2.FAILURE_SIDE_CHANNEL, decode_service_pb2.FAILURE_SIDE_PREFILL


def prefill_service(transport: str = "auto", **settings) -> PrefillService:
    names = (transport,) if transport == "fake" else usable(transport)
    loaded = loaded_fake_model(memory=new_memory(memory_kind(names)))
    return PrefillService(PrefillSettings(model=".", **settings), loader=lambda _: loaded, transports=names)


def decode_service(transport: str = "auto", loaded: LoadedModel | None = None, **settings) -> DecodeService:
    names = (transport,) if transport == "fake" else usable(transport)
    model = loaded or loaded_fake_model()
    return DecodeService(DecodeSettings(model=".", **settings), loader=lambda _: model, transports=names)


@pytest.mark.parametrize("transport", sorted(name for name, it in TRANSPORTS.items() if not it.probe()))
@async_test
async def test_a_sequence_has_the_tokens_that_it_has_alone_whatever_moved_its_pages(transport: str):
    decoder = decode_service(transport)
    async with (
        running(prefill_service(transport, max_step_tokens=8), decoder, decode_service(role="both")) as (
            prefill,
            decode,
            whole,
        ),
        MiniRouter(prefill=prefill, decode=decode) as router,
        MiniRouter(decode=whole) as reference,
    ):
        for attempt in range(2):
            collected = router.start(f"r{attempt}", PROMPT, params=GREEDY)
            assert await collected.tokens() == await reference.generate(f"r{attempt}", PROMPT, params=GREEDY)
            num_moved = (6, 1)[attempt]  # the second one finds the full pages here
            assert (collected.joined.transport, collected.joined.num_transfer_pages) == (transport, num_moved)
            assert collected.joined.transfer_bytes == num_moved * decoder.host.model.layout.page_bytes
        values, labels = decoder.registry.get_sample_value, {"transport": transport}
        assert values("headrace_transfer_wait_seconds_count", labels) == 2
        assert (values("headrace_transfer_busy_seconds_total", labels) or 0) > 0


@async_test
async def test_times_are_finer_than_the_loops_clock():
    """uvloop's tells whole milliseconds, which a small hand-off never takes."""
    loop: Any = asyncio.get_running_loop()
    loop.time = lambda: float(f"{time.monotonic():.3f}")
    decoder = decode_service("grpc")
    async with (
        running(prefill_service("grpc"), decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        await router.generate("r", PROMPT, params=GREEDY)
        name, labels = "headrace_transfer_busy_seconds_total", {"transport": "grpc"}
        busy_ms = 1000 * (decoder.registry.get_sample_value(name, labels) or 0)
        assert abs(busy_ms - round(busy_ms)) > 1e-6


def elsewhere(event):
    """Say that the holder is on another machine."""
    for shard in event.admitted.shards if event.HasField("admitted") else ():
        for offer in shard.transports:
            if offer.HasField("shm"):
                offer.shm.host = "1" * 36
    return [event]


@pytest.mark.parametrize("is_elsewhere", [False, True])
@async_test
async def test_auto_takes_the_best_that_both_prove(is_elsewhere: bool):
    async with (
        running(prefill_service(), decode_service()) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        if is_elsewhere:
            proxy.rewrite = elsewhere
        collected = router.start("r", PROMPT, params=GREEDY)
        assert len(await collected.tokens()) == 8
        assert collected.joined.transport == usable("auto")[is_elsewhere]


@pytest.mark.parametrize("holder", ["auto", "grpc"])
@async_test
async def test_a_transport_that_is_named_is_refused_by_name_where_it_does_not_work(holder: str):
    async with (
        running(prefill_service(holder), decode_service("shm")) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        proxy.rewrite = elsewhere
        collected = router.start("r", PROMPT, params=GREEDY)
        failure = await collected.wait_failure()
        assert (failure.reason, collected.side, collected.joined) == ("NO_COMMON_TRANSPORT", CHANNEL, None)
        said = "shm: it is on another machine" if holder == "auto" else "offers grpc; this worker takes shm"
        assert said in str(failure)


class SlowTaker(StoppedCopy):
    """A decode worker whose copying stops at its first page until it is let go on."""

    def __init__(self) -> None:
        loaded = loaded_fake_model()
        super().__init__(loaded.cache)
        self.service = decode_service("shm", loaded)


@pytest.mark.parametrize(
    ("is_written", "reason", "side"), [(False, "STALE_PAGE", PREFILL), (True, "CHECKSUM", CHANNEL)]
)
@async_test
async def test_a_page_that_is_reused_while_it_is_read_never_joins(is_written: bool, reason: str, side: int):
    """Nobody asked the holder: the bytes tell, and where they are the same by chance, its last look."""
    prefiller, taker = prefill_service("shm"), SlowTaker()
    async with (
        running(prefiller, taker.service) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        collected = router.start("r", PROMPT, params=GREEDY)
        await taker.reached()
        (lease,) = prefiller.leases.leases
        run = lease.runs[0]
        object.__setattr__(run, "generations", (run.generations[0] - 1, *run.generations[1:]))
        if is_written:
            prefiller.host.model.cache.page_bytes(0, run.page_ids[0])[0] ^= 1
        taker.go_on()
        assert ((await collected.wait_failure()).reason, collected.side) == (reason, side)
        assert collected.joined is None


@async_test
async def test_pages_have_no_new_owner_before_the_copy_into_them_has_ended():
    taker = SlowTaker()
    async with (
        running(prefill_service("shm"), taker.service) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        collected = router.start("r", PROMPT, params=GREEDY)
        await taker.reached()
        assert taker.service.registry.get_sample_value("headrace_handoffs") == 1
        router.cancel(collected)
        await eventually(lambda: taker.service.num_sequences == 0, "the sequence is over")
        counts = await inspect(taker.service)
        assert counts[PageState.QUARANTINED] == 6
        taker.go_on()
        await eventually(lambda: taker.service.registry.get_sample_value("headrace_handoffs") == 0, "it has ended")


@async_test
async def test_a_holder_that_goes_away_in_mid_copy_is_an_error_and_leaves_no_socket():
    prefiller, taker = prefill_service("shm"), SlowTaker()
    async with running(taker.service) as (decode,):
        prefill = await prefiller.start()
        async with MiniRouter(prefill=prefill, decode=decode) as router:
            collected = router.start("r", PROMPT, params=GREEDY)
            await taker.reached()
            stopping = asyncio.ensure_future(prefiller.stop())
            failure = asyncio.ensure_future(collected.wait_failure())
            await asyncio.sleep(0)
            taker.go_on()
            # What it says, unless its connections end before that is heard.
            assert (await failure).reason in ("DRAINING", "HOLDER_LOST")
            await stopping
            (end,) = prefiller._ends
            assert end.server.num_connections == 0
            shm = taker.service._taker.transports["shm"]
            await eventually(lambda: shm.endpoints == [], "the taker knows of its end")
