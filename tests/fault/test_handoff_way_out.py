"""A decode worker that goes away gives its running sequences to another: from its own pages, to the same tokens."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import pytest
from headrace_core import beats
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import HandoffLostError
from headrace_core.kv.page_pool import PageState
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.hold_proxy import HoldProxy
from headrace_core.testing.mini_router import Collected, MiniRouter
from headrace_core.testing.mini_taker import MiniTaker
from headrace_core.testing.worker_pair import all_free, inspect, running
from headrace_core.transfer.fake import POOLS, FakeFaults, pool_name
from headrace_core.transfer.values import CachedPrefix
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

ROUTER = 77
PAGE = 4
PROMPT = list(range(1, 23))
GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.1, seed=5, max_tokens=40, ignore_eos=True)
PENALISED = SamplingParams(
    temperature=0.8,
    seed=9,
    max_tokens=40,
    ignore_eos=True,
    repetition_penalty=1.3,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    top_logprobs=3,
)


def prefill_service(*, transports=("fake",)) -> PrefillService:
    return PrefillService(PrefillSettings(model="."), loader=lambda _: loaded_fake_model(), transports=transports)


def decode_service(*, transports=("fake",), model: FakeModel | None = None, **settings) -> DecodeService:
    loaded = loaded_fake_model(num_pages=256, model=model)
    return DecodeService(DecodeSettings(model=".", **settings), loader=lambda _: loaded, transports=transports)


def faults_of(holder) -> FakeFaults:
    return POOLS[pool_name(holder.host.incarnation)].faults


def counted(service, name: str, **labels: str) -> float:
    return service.registry.get_sample_value(name, labels) or 0.0


@dataclass
class Fleet:
    """A prefill worker and two decode workers; the steps of the first one are held when a test says so."""

    prefiller: PrefillService
    first: DecodeService
    second: DecodeService
    model: FakeModel
    one: MiniRouter
    two: MiniRouter
    holder_address: str
    """Where the first is reached by those who take its pages."""
    known: list[int] = field(default_factory=list)
    """What was told before the move: a step that is under way then makes another token, which is told to nobody."""

    async def runs(self, count=9, *, params=SEEDED, prefill: str | None = None) -> Collected:
        """Start a sequence at the first, and let it have `count` tokens and a step under way."""
        self.model.hold(after=count - (prefill is None))
        collected = self.one.start("r", PROMPT, params=params, prefill=prefill)
        await collected.wait_tokens(count)
        await asyncio.to_thread(self.model.wait_held)
        return collected

    async def keep_pages(self, collected: Collected) -> None:
        """Have the first, which drains, compute it no further, from the step that is under way on."""
        self.one.cancel(collected, keeps_pages=True)
        behind = self.one.start("behind", PROMPT, params=SEEDED)
        assert (await behind.wait_failure()).reason == "DRAINING", "so what was sent before it has come, too"
        self.model.release()

    async def move(self, collected: Collected, *, params=SEEDED, attempt=2, **more) -> Collected:
        """Do what a router does about a worker that drains, to a sequence of which it knows what it was told."""
        self.first.host.begin_drain()
        await self.keep_pages(collected)
        self.known = self.known or list(collected.token_ids)
        known = [*PROMPT, *self.known]
        num_full = (len(known) - 1) // PAGE * PAGE
        return self.two.start(
            "r",
            known,
            params=params,
            attempt=attempt,
            num_prompt_tokens=len(PROMPT),
            cached=CachedPrefix(self.holder_address, self.first.host.incarnation, num_full),
            takes_prefix=True,
            local_below=PAGE,
            **more,
        )


@contextlib.asynccontextmanager
async def a_fleet(*, transport="fake", holder_proxy: HoldProxy | None = None, has_prefill=True):
    model = FakeModel()
    services = [prefill_service(transports=[transport]), decode_service(transports=[transport], model=model)]
    services.append(decode_service(transports=[transport]))
    async with running(*services) as (prefill, one, two):
        if not has_prefill:
            prefill = ""
        async with (
            MiniRouter(prefill=prefill, decode=one, router_id=ROUTER) as at_one,
            MiniRouter(prefill=prefill, decode=two, router_id=ROUTER) as at_two,
        ):
            yield Fleet(*services, model, at_one, at_two, one)


async def reference(params: SamplingParams) -> list[int]:
    async with running(decode_service(role="both")) as (whole,), MiniRouter(decode=whole) as router:
        return await router.generate("reference", PROMPT, params=params)


@pytest.mark.parametrize("transport", ["fake", "grpc"])
@pytest.mark.parametrize("params", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "penalised"])
@async_test
async def test_a_running_sequence_goes_on_elsewhere_from_its_own_pages(transport: str, params: SamplingParams):
    async with a_fleet(transport=transport) as fleet:
        collected = await fleet.runs(params=params)
        draining = asyncio.ensure_future(fleet.first.drain())
        moved = await fleet.move(collected, params=params)
        rest = await moved.tokens()
        assert [*fleet.known, *rest] == await reference(params)
        assert moved.prefilled is None, "nobody was asked to compute it"
        assert counted(fleet.prefiller, "headrace_step_tokens_total") == len(PROMPT)
        known = len(PROMPT) + 9
        assert moved.joined.num_transfer_pages == (known - 1) // PAGE == 7
        assert moved.joined.transport == transport
        assert counted(fleet.second, "headrace_step_tokens_total") == known - 28 + len(rest) - 1
        assert counted(fleet.second, "headrace_prefix_fetches_total", outcome="taken") == 1
        assert counted(fleet.first, "headrace_lease_ends_total", outcome="taken") == 1
        assert not draining.done(), "its pages are still kept"
        assert not collected.is_over, "it is told nothing more"
        fleet.one.cancel(collected)
        await draining
        await all_free(fleet.first)


def _flip(fleet: Fleet, proxy: HoldProxy) -> None:
    faults_of(fleet.first).has_flipped_byte = True


def _truncate(fleet: Fleet, proxy: HoldProxy) -> None:
    faults_of(fleet.first).is_truncated = True


def _restarted(fleet: Fleet, proxy: HoldProxy) -> None:
    proxy.rewrite_open = lambda it: setattr(it, "holder_incarnation", 7)


def _stranger(fleet: Fleet, proxy: HoldProxy) -> None:
    proxy.rewrite_open = lambda it: setattr(it, "sequence_number", 99)


def _away(fleet: Fleet, proxy: HoldProxy) -> None:
    fleet.holder_address = "127.0.0.1:9"


FAULTS = {
    "a byte": (_flip, "CHECKSUM"),
    "fewer bytes": (_truncate, "SHORT_READ"),
    "another process": (_restarted, "WORKER_RESTARTED"),
    "a sequence that it has not": (_stranger, "DRAINING"),
    "nobody there": (_away, "HOLDER_LOST"),
}


@pytest.mark.parametrize("has_prefill", [True, False], ids=["computed elsewhere", "computed here"])
@pytest.mark.parametrize("fault", FAULTS)
@async_test
async def test_what_is_wrong_with_its_pages_is_computed_and_nobodys_error(fault: str, has_prefill: bool):
    break_it, reason = FAULTS[fault]
    async with a_fleet() as fleet, HoldProxy(fleet.holder_address) as proxy:
        fleet.holder_address = proxy.address
        collected = await fleet.runs()
        break_it(fleet, proxy)
        moved = await fleet.move(collected, prefill=None if has_prefill else "")
        assert [*fleet.known, *await moved.tokens()] == await reference(SEEDED)
        assert (moved.prefilled is not None) == has_prefill
        assert counted(fleet.second, "headrace_prefix_fetches_total", outcome="failed") == 1
        assert counted(fleet.second, "headrace_handoff_failures_total", reason=reason) == 1
        fleet.one.cancel(collected)


@pytest.mark.parametrize("phase", ["asked", "pulling"])
@pytest.mark.parametrize("how", ["killed", "silent"])
@async_test
async def test_a_worker_that_is_lost_while_its_pages_are_taken_costs_the_computing(phase, how, monkeypatch):
    monkeypatch.setattr(beats, "BEAT_S", 0.02)
    async with a_fleet() as fleet:
        collected = await fleet.runs()
        async with HoldProxy(fleet.holder_address) as proxy:
            fleet.holder_address = proxy.address
            faults = faults_of(fleet.first)
            if phase == "asked":
                proxy.gates["admitted"] = asyncio.Event()
            else:
                faults.gate = asyncio.Event()
            moved = await fleet.move(collected)
            await eventually(lambda: "admitted" in proxy.seen, "it is asked")
            if phase == "pulling":
                await faults.entered.wait()
            if how == "silent":
                proxy.is_silent = True
                await moved.wait_tokens(1)
        assert [*fleet.known, *await moved.tokens()] == await reference(SEEDED)
        assert counted(fleet.second, "headrace_prefix_fetches_total", outcome="failed") == 1
        fleet.one.cancel(collected)


@async_test
async def test_an_attempt_that_failed_leaves_the_pages_for_the_next_one():
    async with a_fleet() as fleet:
        collected = await fleet.runs()
        refused = await fleet.move(collected, timeout_s=0.0)
        assert (await refused.wait_failure()).reason == "BAD_REQUEST", "it has no time"
        moved = await fleet.move(collected, attempt=3)
        assert [*fleet.known, *await moved.tokens()] == await reference(SEEDED)
        assert moved.joined.num_transfer_pages == 7
        fleet.one.cancel(collected)


@pytest.mark.parametrize("by", ["cancel", "session"])
@async_test
async def test_a_sequence_that_ends_while_its_pages_come_sets_them_aside_until_nothing_can_land(by: str):
    async with a_fleet() as fleet:
        collected = await fleet.runs()
        faults = faults_of(fleet.first)
        faults.gate, faults.is_cancel_ignored = asyncio.Event(), True
        faults.entered.clear()
        moved = await fleet.move(collected)
        await faults.entered.wait()
        if by == "cancel":
            fleet.two.cancel(moved)
        else:
            await fleet.two.close_session()
        await eventually(lambda: not fleet.second.num_sequences, "it is over")
        counts = await inspect(fleet.second)
        assert (counts[PageState.QUARANTINED], counts[PageState.OWNED]) == (8, 0)
        faults.gate.set()
        await all_free(fleet.second)
        fleet.one.cancel(collected)


@pytest.mark.parametrize("by", ["cancel", "session", "deadline"])
@async_test
async def test_pages_that_nobody_takes_are_let_go_with_the_sequence(by: str):
    async with a_fleet() as fleet:
        fleet.model.hold(after=8)
        timeout = {"timeout_s": 2.0} if by == "deadline" else {}
        collected = fleet.one.start("r", PROMPT, params=SEEDED, **timeout)
        await collected.wait_tokens(9)
        draining = asyncio.ensure_future(fleet.first.drain())
        await fleet.keep_pages(collected)
        assert fleet.first.num_sequences == 1
        assert not draining.done()
        if by == "cancel":
            fleet.one.cancel(collected)
        elif by == "session":
            await fleet.one.close_session()
        await draining
        assert len(collected.token_ids) < 12, "it was computed no further"
        await all_free(fleet.first)


@async_test
async def test_a_sequence_that_has_not_joined_keeps_nothing():
    async with a_fleet() as fleet:
        faults = faults_of(fleet.prefiller)
        faults.gate = asyncio.Event()
        collected = fleet.one.start("r", PROMPT, params=SEEDED)
        await faults.entered.wait()
        fleet.one.cancel(collected, keeps_pages=True)
        await eventually(lambda: not fleet.first.num_sequences, "it is over")
        faults.gate.set()
        await all_free(fleet.first)


@async_test
async def test_a_worker_that_drains_gives_nobody_a_prefix_of_what_it_does_not_run():
    async with a_fleet() as fleet:
        collected = await fleet.runs()
        fleet.first.host.begin_drain()
        async with MiniTaker(fleet.holder_address) as taker:
            incarnation = fleet.first.host.incarnation
            asked = taker.order(
                "r", PROMPT, params=SEEDED, change=lambda it: setattr(it, "holder_incarnation", incarnation)
            )
            error = await asked.refused()
        assert not isinstance(error, HandoffLostError)
        assert error.reason == "DRAINING"
        fleet.model.release()
        assert await collected.tokens() == await reference(SEEDED), "who is not moved goes on"
