"""Pages flow while later chunks are computed; a run is sealed once, and a failure in between is an error."""

import asyncio

import pytest
from headrace.v1 import decode_service_pb2
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.hold_proxy import HoldProxy
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.mini_taker import MiniTaker
from headrace_core.testing.worker_pair import all_free, running
from headrace_core.transfer.fake import POOLS, FakeFaults, pool_name
from headrace_core.transfer.memory import new_memory
from headrace_core.transfer.taker import MOST_PULLS
from headrace_core.transfer.transports import memory_kind
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True)
PROMPT = list(range(1, 23))
PREFILL = decode_service_pb2.FAILURE_SIDE_PREFILL


def prefill_service(model: FakeModel | None = None, *, transports=("fake",), **settings) -> PrefillService:
    loaded = loaded_fake_model(model=model, num_pages=256, memory=new_memory(memory_kind(transports)))
    settings = {"max_step_tokens": 8, **settings}
    return PrefillService(PrefillSettings(model=".", **settings), loader=lambda _: loaded, transports=transports)


def decode_service(*, transports=("fake",), model: FakeModel | None = None, **settings) -> DecodeService:
    loaded = loaded_fake_model(num_pages=256, model=model)
    return DecodeService(DecodeSettings(model=".", **settings), loader=lambda _: loaded, transports=transports)


def faults_of(prefiller: PrefillService) -> FakeFaults:
    return POOLS[pool_name(prefiller.host.incarnation)].faults


def moved(faults: FakeFaults) -> list[tuple[int, int]]:
    """Return (first page, number of pages) of each run that was pulled."""
    return [(run.first_page, run.num_pages) for _, run in faults.pulled]


@async_test
async def test_rule_3_pages_are_taken_while_later_chunks_are_computed():
    model = FakeModel()
    prefiller, alone = prefill_service(model), decode_service(role="both")
    async with (
        running(prefiller, decode_service(), alone) as (prefill, decode, whole),
        MiniRouter(prefill=prefill, decode=decode) as router,
        MiniRouter(decode=whole) as reference,
    ):
        model.hold(after=2)
        collected = router.start("r", PROMPT, params=GREEDY)
        faults = faults_of(prefiller)
        await eventually(lambda: moved(faults) == [(0, 2), (2, 2)] and not faults.num_moving, "two chunks are there")
        assert collected.prefilled is None
        model.release()
        assert await collected.tokens() == await reference.generate("r", PROMPT, params=GREEDY)
        assert moved(faults) == [(0, 2), (2, 2), (4, 2)]
        assert collected.joined.num_transfer_pages == 6


@pytest.mark.parametrize("transport", ["fake", "grpc", "shm"])
@async_test
async def test_equal_prompts_in_one_step_are_handed_off_each_with_its_own_pages(transport: str):
    prefiller = prefill_service(transports=[transport], max_step_tokens=44)
    async with (
        running(prefiller, decode_service(transports=[transport])) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        tokens = await asyncio.gather(*(router.generate(f"r{i}", PROMPT, params=GREEDY) for i in range(4)))
        assert tokens == tokens[:1] * 4


@async_test
async def test_rule_3_a_step_that_fails_after_it_sealed_loses_the_lease():
    model = FakeModel()
    prefiller, decoder = prefill_service(model), decode_service()
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        model.hold(after=2)
        collected = router.start("r", PROMPT, params=GREEDY)
        faults = faults_of(prefiller)
        await eventually(lambda: len(faults.pulled) == 2 and not faults.num_moving, "two chunks are sealed and moved")
        model.failure = RuntimeError("broken")
        model.release()
        assert ((await collected.wait_failure()).reason, collected.side) == ("ENGINE_FAILED", PREFILL)
        assert collected.token_ids == []
        await all_free(decoder)
        assert not prefiller.leases.leases
        model.failure = None
        again = router.start("r", PROMPT, params=GREEDY, attempt=2)
        assert len(await again.tokens()) == 8
        assert again.prefilled.num_cached_tokens == 0, "what came before the failure is not trusted"


@async_test
async def test_rule_4_cached_pages_are_taken_before_anything_is_computed():
    model = FakeModel()
    prefiller = prefill_service(model)
    async with (
        running(prefiller, decode_service(), decode_service()) as (prefill, warm, cold),
        MiniRouter(prefill=prefill, decode=warm) as earlier,
        MiniRouter(prefill=prefill, decode=cold) as router,
    ):
        first = await earlier.generate("a", PROMPT, params=GREEDY)
        faults = faults_of(prefiller)
        faults.pulled.clear()
        model.hold()
        again = router.start("b", PROMPT, params=GREEDY)
        await eventually(lambda: moved(faults) == [(0, 5)], "the cached pages are taken")
        assert again.prefilled is None
        model.release()
        assert await again.tokens() == first
        assert again.prefilled.num_cached_tokens == 20


@async_test
async def test_a_prompt_is_ordered_computed_and_taken_while_a_step_of_the_taker_is_under_way():
    """Its first token does not wait for those who decode."""
    model = FakeModel()
    prefiller = prefill_service()
    async with (
        running(prefiller, decode_service(model=model)) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        model.hold()
        beside = router.start("beside", [9] * 5, params=GREEDY)
        await beside.wait_tokens(1)
        await asyncio.to_thread(model.wait_held)
        collected = router.start("r", PROMPT, params=GREEDY)
        await collected.wait_tokens(1)
        await eventually(lambda: not prefiller.leases.leases, "all of it was taken")
        assert (len(collected.token_ids), collected.joined) == (1, None)
        model.release()
        assert len(await collected.tokens()) == len(await beside.tokens()) == 8


@async_test
async def test_rule_5_the_first_token_is_told_while_its_cache_is_still_on_the_way():
    prefiller = prefill_service()
    async with (
        running(prefiller, decode_service()) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        faults = faults_of(prefiller)
        faults.gate = asyncio.Event()
        collected = router.start("r", PROMPT, params=GREEDY)
        await collected.wait_tokens(1)
        await eventually(lambda: faults.num_moving == 3, "all of it is on the way")
        assert (collected.joined, len(collected.token_ids)) == (None, 1)
        faults.gate.set()
        assert len(await collected.tokens()) == 8


@async_test
async def test_rule_5_nothing_joins_before_the_holder_has_looked_a_last_time():
    async with (
        running(prefill_service(), decode_service()) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        proxy.gates["confirmed"] = asyncio.Event()
        collected = router.start("r", PROMPT, params=GREEDY)
        await eventually(lambda: "confirmed" in proxy.seen, "all is verified and confirmed")
        assert collected.joined is None
        proxy.gates["confirmed"].set()
        assert len(await collected.tokens()) == 8


@async_test
async def test_rule_1_at_most_so_many_runs_are_pulled_at_once_and_the_oldest_sequence_goes_first():
    prefiller = prefill_service(max_step_tokens=512)
    async with (
        running(prefiller, decode_service()) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        faults = faults_of(prefiller)
        faults.gate = asyncio.Event()
        started = []
        for i in range(3 * MOST_PULLS):
            started.append(router.start(f"r{i}", [i + 1] * 9, params=GREEDY))
            await started[-1].wait_tokens(1)
        assert faults.num_moving == MOST_PULLS
        order = {lease.lease_key: lease.order.owner[1] for lease in prefiller.leases.leases}
        faults.gate.set()
        for collected in started:
            assert len(await collected.tokens()) == 8
        assert faults.most_moving == MOST_PULLS
        assert [order[key] for key, _ in faults.pulled] == sorted(order.values())


@async_test
async def test_rule_8_the_next_attempt_finds_what_was_computed_when_its_taker_died():
    model = FakeModel()
    prefiller = prefill_service(model)
    async with running(prefiller) as (prefill,), MiniTaker(prefill) as taker:
        model.hold(after=2)
        dying = taker.order("r", PROMPT, params=GREEDY)
        await dying.wait_runs(2)
        await dying.cancel()
        await eventually(lambda: not prefiller.leases.leases, "its lease is over")
        again = taker.order("r", PROMPT, params=GREEDY, attempt=2)
        model.release()
        assert (await again.wait_admitted()).num_cached_tokens >= 16
        await again.wait_all()
        assert again.kinds[0] == "admitted"


def two_shards(event):
    """Say that each of the holder's two layers is with a part of its own."""
    if event.HasField("admitted"):
        second = event.admitted.shards.add()
        second.CopyFrom(event.admitted.shards[0])
        second.rank, second.first_layer = 1, 1
        for shard in event.admitted.shards:
            shard.num_layers = 1
    return [event]


@pytest.mark.parametrize("is_one_lost", [False, True], ids=["both there", "one restarted"])
@async_test
async def test_rule_10_each_part_of_a_page_comes_from_whom_it_is_with_and_all_must_be_there(is_one_lost: bool):
    def offered(event):
        (event,) = two_shards(event)
        if event.HasField("admitted") and is_one_lost:
            event.admitted.shards[1].incarnation ^= 1
        return [event]

    prefiller, decoder = prefill_service(), decode_service()
    async with (
        running(prefiller, decoder) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        expected = await router.generate("alone", PROMPT, params=GREEDY, prefill=prefill)
        faults = faults_of(prefiller)
        faults.pulled.clear()
        proxy.rewrite = offered
        collected = router.start("r", PROMPT, params=GREEDY)
        if is_one_lost:
            assert ((await collected.wait_failure()).reason, collected.joined) == ("WORKER_RESTARTED", None)
        else:
            assert await collected.tokens() == expected
            assert {(run.first_layer, run.num_layers) for _, run in faults.pulled} == {(0, 1), (1, 1)}


@async_test
async def test_a_long_prompt_is_moved_in_runs_of_a_bounded_size(monkeypatch):
    from headrace_core.transfer import sealer

    monkeypatch.setattr(sealer.Sealer.__init__, "__kwdefaults__", {"most_run_bytes": 2 * 2 * 64})
    prefiller = prefill_service(max_step_tokens=512)
    async with (
        running(prefiller, decode_service()) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        assert len(await router.generate("r", PROMPT, params=GREEDY)) == 8
        assert moved(faults_of(prefiller)) == [(0, 2), (2, 2), (4, 2)]
