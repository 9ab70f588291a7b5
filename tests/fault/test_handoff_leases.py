"""Leases: pages are held as long as the lease lives, and not a moment longer."""

import asyncio
import collections

import pytest
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import HandoffLostError
from headrace_core.kv.page_pool import PageState
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import all_free, inspect, running
from headrace_core.transfer.fake import POOLS, FakeFaults, FakePool, fake_offer
from headrace_core.transfer.lease import LeaseTable, cancelled
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True)
PROMPT = list(range(1, 23))


def prefill_service(**settings) -> PrefillService:
    loaded = loaded_fake_model()
    service = PrefillService(
        PrefillSettings(model=".", **settings), loader=lambda _: loaded, offers=[fake_offer("leases")]
    )
    return service


def decode_service(*, transports=(), model: FakeModel | None = None, num_pages: int = 64, **settings) -> DecodeService:
    loaded = loaded_fake_model(num_pages=num_pages, model=model)
    return DecodeService(DecodeSettings(model=".", **settings), loader=lambda _: loaded, transports=transports)


class ImpatientHolder:
    """Says that its leases last 10 ms, so that they are renewed often; they last as long as those of `leases`."""

    def __init__(self, leases: LeaseTable) -> None:
        self._leases = leases
        self.held_pages, self.release = leases.held_pages, leases.release
        self.renewed = collections.Counter[str]()

    def renew(self, lease_id: str, *, incarnation: int) -> float:
        self._leases.renew(lease_id, incarnation=incarnation)
        self.renewed[lease_id] += 1
        return 0.01


@async_test
async def test_a_lease_nobody_takes_expires_and_frees_its_pages():
    prefiller = prefill_service(lease_s=0.05)
    async with running(prefiller) as (prefill,), MiniRouter(prefill=prefill) as router:
        await router.prefill("r", PROMPT, params=GREEDY)
        await all_free(prefiller)


@async_test
async def test_pages_are_held_while_the_lease_lives():
    prefiller = prefill_service()
    async with running(prefiller) as (prefill,), MiniRouter(prefill=prefill) as router:
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        counts = await inspect(prefiller)
        assert counts[PageState.OWNED] == 1, "the partial page; full ones are shared through the prefix cache"
        assert prefiller.host.board.report.num_free_pages == 64 - len(handoff.pages)


@async_test
async def test_a_lease_that_expired_before_the_pull_is_refused():
    prefiller = prefill_service(lease_s=0.05)
    async with (
        running(prefiller, decode_service()) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        await all_free(prefiller)
        handoff.lease.duration_ms = 30_000  # the taker has time to ask: it is the holder that says no
        with pytest.raises(HandoffLostError) as raised:
            await router.start("r", PROMPT, params=GREEDY, handoff=handoff)
        assert raised.value.reason == "LEASE_EXPIRED"


@async_test
async def test_a_lease_that_ends_while_pages_move_is_an_error():
    faults = FakeFaults(gate=asyncio.Event())
    prefiller = prefill_service()
    decoder = decode_service(transports=["fake"])
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        POOLS["leases"] = FakePool(prefiller.leases, prefiller.host.model.cache, faults)
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        starting = asyncio.ensure_future(router.start("r", PROMPT, params=GREEDY, handoff=handoff))
        await faults.entered.wait()
        (lease,) = prefiller.leases.leases
        prefiller.leases.abort(lease, cancelled())
        assert faults.gate is not None
        faults.gate.set()
        with pytest.raises(HandoffLostError) as raised:
            await starting
        assert raised.value.reason == "LEASE_EXPIRED"


@async_test
async def test_a_lease_is_renewed_again_and_again_while_its_sequence_queues_for_pages():
    prefiller = prefill_service()
    model = FakeModel()
    decoder = decode_service(transports=["fake"], model=model, num_pages=12, max_step_sequences=1)
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        holder = ImpatientHolder(prefiller.leases)
        POOLS["leases"] = FakePool(holder, prefiller.host.model.cache)
        model.hold()
        first = (await router.prefill("a", PROMPT, params=GREEDY)).handoff
        one = asyncio.ensure_future(router.start("a", PROMPT, params=GREEDY, handoff=first))
        await asyncio.to_thread(model.wait_held)
        second = (await router.prefill("b", PROMPT, params=GREEDY)).handoff
        second.lease.duration_ms = 10
        two = asyncio.ensure_future(router.start("b", PROMPT, params=GREEDY, handoff=second))
        await eventually(lambda: holder.renewed[second.lease.lease_id] >= 5, "it was renewed five times")
        assert not two.done()
        assert [lease.request_id for lease in prefiller.leases.leases] == ["b"]
        model.release()
        for started in (one, two):
            collected, _ = await started
            await collected.wait_end()
            assert len(collected.token_ids) == 7


@async_test
async def test_a_holder_that_stopped_is_noticed_while_pages_move():
    faults = FakeFaults(gate=asyncio.Event())
    prefiller = prefill_service()
    decoder = decode_service(transports=["fake"], transfer_timeout_s=0.2)
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        POOLS["leases"] = FakePool(prefiller.leases, prefiller.host.model.cache, faults)
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        with pytest.raises(HandoffLostError) as raised:
            await router.start("r", PROMPT, params=GREEDY, handoff=handoff)
        assert raised.value.reason == "HOLDER_LOST"


@async_test
async def test_a_holder_that_is_gone_is_an_error_at_once():
    async with running(decode_service()) as (decode,):
        async with running(prefill_service()) as (prefill,), MiniRouter(prefill=prefill) as router:
            handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        async with MiniRouter(decode=decode) as router:
            with pytest.raises(HandoffLostError) as raised:
                await router.start("r", PROMPT, params=GREEDY, handoff=handoff)
            assert raised.value.reason == "HOLDER_LOST"
