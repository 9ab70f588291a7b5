"""Rule 2: the call is the lease. Pages are held as long as it lives, and not a moment longer, whoever ends it."""

import asyncio

import pytest
from headrace.v1 import decode_service_pb2
from headrace_core import beats
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.kv.page_pool import PageState
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.hold_proxy import HoldProxy
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.mini_taker import MiniTaker
from headrace_core.testing.worker_pair import all_free, inspect, running
from headrace_core.transfer.fake import POOLS, pool_name
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True)
PROMPT = list(range(1, 23))
CHANNEL, PREFILL = decode_service_pb2.FAILURE_SIDE_CHANNEL, decode_service_pb2.FAILURE_SIDE_PREFILL


def prefill_service(*, transports=("grpc",), model: FakeModel | None = None, **settings) -> PrefillService:
    loaded = loaded_fake_model(model=model)
    return PrefillService(PrefillSettings(model=".", **settings), loader=lambda _: loaded, transports=transports)


def decode_service(*, transports=(), model: FakeModel | None = None, num_pages: int = 64, **settings) -> DecodeService:
    loaded = loaded_fake_model(num_pages=num_pages, model=model)
    return DecodeService(DecodeSettings(model=".", **settings), loader=lambda _: loaded, transports=transports)


@async_test
async def test_pages_are_held_while_the_call_lives_and_free_when_it_ends():
    prefiller = prefill_service()
    async with running(prefiller) as (prefill,), MiniTaker(prefill) as taker:
        ordered = taker.order("r", PROMPT, params=GREEDY)
        await ordered.wait_runs()
        counts = await inspect(prefiller)
        assert counts[PageState.OWNED] == 1, "the partial page; full ones are shared through the prefix cache"
        assert prefiller.host.board.report.num_free_pages == 64 - 6
        await ordered.cancel()
        await all_free(prefiller)
        assert prefiller.registry.get_sample_value("headrace_lease_ends_total", {"outcome": "aborted"}) == 1


@async_test
async def test_a_confirmed_lease_is_over_and_the_call_ends():
    prefiller = prefill_service()
    async with running(prefiller) as (prefill,), MiniTaker(prefill) as taker:
        ordered = taker.order("r", PROMPT, params=GREEDY)
        await ordered.wait_runs()
        await ordered.confirm()
        await asyncio.wait([ordered.reading])
        assert ordered.error is None
        assert ordered.kinds == ["admitted", "last", "run", "confirmed"]
        await all_free(prefiller)
        assert prefiller.registry.get_sample_value("headrace_lease_ends_total", {"outcome": "taken"}) == 1


@async_test
async def test_nothing_is_confirmed_before_it_is_computed():
    model = FakeModel()
    model.hold()
    prefiller = prefill_service(model=model)
    async with running(prefiller) as (prefill,), MiniTaker(prefill) as taker:
        ordered = taker.order("r", PROMPT, params=GREEDY)
        await ordered.wait_admitted()
        ordered._call.confirm()
        assert (await ordered.refused()).reason == "BAD_REQUEST"
        model.release()
        await all_free(prefiller)


@async_test
async def test_the_deadline_of_the_order_frees_its_pages():
    prefiller = prefill_service()
    async with running(prefiller) as (prefill,), MiniTaker(prefill) as taker:
        ordered = taker.order("r", PROMPT, params=GREEDY, timeout_s=0.3)
        assert (await ordered.refused()).reason == "DEADLINE_EXCEEDED"
        await all_free(prefiller)


@async_test
async def test_a_taker_that_falls_silent_loses_its_pages(monkeypatch):
    """Its connection stands, and gRPC's own threads answer pings; but its loop is dead."""
    monkeypatch.setattr(beats, "BEAT_S", 0.02)
    prefiller = prefill_service()
    async with running(prefiller) as (prefill,), MiniTaker(prefill) as taker:
        beating, silent = (taker.order(name, PROMPT, params=GREEDY) for name in "ab")
        await silent.wait_runs()
        await beating.wait_runs()
        silent.fall_silent()
        assert (await silent.refused()).reason == "TAKER_LOST"
        assert not beating.is_over
        assert len(prefiller.leases.leases) == 1


@async_test
async def test_a_holder_that_falls_silent_is_left(monkeypatch):
    monkeypatch.setattr(beats, "BEAT_S", 0.02)
    model = FakeModel()
    model.hold()
    decoder = decode_service()
    async with (
        running(prefill_service(model=model), decoder) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        beating = router.start("a", PROMPT, params=GREEDY)
        await eventually(lambda: len(proxy.opened) == 1, "it is ordered")
        proxy.is_silent = True
        collected = router.start("b", PROMPT, params=GREEDY)
        assert ((await collected.wait_failure()).reason, collected.side) == ("HOLDER_LOST", PREFILL)
        await beating.wait_end()
        model.release()


@async_test
async def test_a_holder_and_taker_that_have_nothing_to_say_go_on(monkeypatch):
    monkeypatch.setattr(beats, "BEAT_S", 0.02)
    model = FakeModel()
    model.hold()
    async with (
        running(prefill_service(model=model), decode_service()) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        collected = router.start("a", PROMPT, params=GREEDY)
        beaten = proxy.num_beats
        await eventually(lambda: proxy.num_beats > beaten + 3 * beats.MOST_QUIET_BEATS, "they beat for long")
        model.release()
        assert len(await collected.tokens()) == 8


@async_test
async def test_a_lease_that_ends_while_pages_move_is_an_error():
    prefiller = prefill_service(transports=["fake"])
    async with (
        running(prefiller, decode_service(transports=["fake"])) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        faults = POOLS[pool_name(prefiller.host.incarnation)].faults
        faults.gate = asyncio.Event()
        collected = router.start("r", PROMPT, params=GREEDY)
        await faults.entered.wait()
        (lease,) = prefiller.leases.leases
        prefiller.leases.take(lease)  # behind the call's back: only the transport can notice
        faults.gate.set()
        assert ((await collected.wait_failure()).reason, collected.side) == ("LEASE_ENDED", PREFILL)


@async_test
async def test_a_transfer_that_stops_is_noticed():
    prefiller = prefill_service(transports=["fake"])
    async with (
        running(prefiller, decode_service(transports=["fake"], transfer_timeout_s=0.2)) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        POOLS[pool_name(prefiller.host.incarnation)].faults.gate = asyncio.Event()
        collected = router.start("r", PROMPT, params=GREEDY)
        assert ((await collected.wait_failure()).reason, collected.side) == ("HOLDER_LOST", CHANNEL)


@async_test
async def test_a_holder_that_is_gone_is_an_error_at_once():
    async with running(decode_service()) as (decode,):
        async with running(prefill_service()) as (prefill,):
            pass
        async with MiniRouter(decode=decode, prefill=prefill) as router:
            collected = router.start("r", PROMPT, params=GREEDY)
            assert ((await collected.wait_failure()).reason, collected.side) == ("HOLDER_LOST", CHANNEL)


@pytest.mark.parametrize("is_computed", [False, True], ids=["computing", "held"])
@async_test
async def test_a_holder_that_goes_away_says_so(is_computed: bool):
    model = FakeModel()
    prefiller, decoder = prefill_service(transports=["fake"], model=model), decode_service(transports=["fake"])
    async with running(decoder) as (decode,):
        prefill = await prefiller.start()
        async with MiniRouter(decode=decode, prefill=prefill) as router:
            faults = POOLS[pool_name(prefiller.host.incarnation)].faults
            faults.gate = asyncio.Event()
            if not is_computed:
                model.hold()
            collected = router.start("r", PROMPT, params=GREEDY)
            await (faults.entered.wait() if is_computed else asyncio.to_thread(model.wait_held))
            stopping = asyncio.ensure_future(prefiller.stop())
            assert ((await collected.wait_failure()).reason, collected.side) == ("DRAINING", PREFILL)
            model.release()
            await stopping
