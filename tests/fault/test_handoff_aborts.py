"""Abort in every phase, from either side: every page comes back, and none before the last byte has landed."""

import asyncio
import contextlib
import dataclasses

import pytest
from headrace_core.batch.spec import SequenceSpec
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import HeadraceError, NotFoundError, OverloadedError, UnavailableError
from headrace_core.kv.page_pool import PageState
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.mini_router import Collected, MiniRouter
from headrace_core.testing.worker_pair import all_free, inspect, running
from headrace_core.transfer.fake import POOLS, FakeFaults, FakePool, fake_offer
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True)
ENDLESS = dataclasses.replace(GREEDY, max_tokens=480)
PROMPT = list(range(1, 23))


def prefill_service(model: FakeModel | None = None, **settings) -> PrefillService:
    loaded = loaded_fake_model(model=model)
    return PrefillService(
        PrefillSettings(model=".", **settings), loader=lambda _: loaded, offers=[fake_offer("aborts")]
    )


def decode_service(
    *, transports=(), model: FakeModel | None = None, max_unread_tokens=10_000, drain_timeout_s=5.0, **settings
):
    loaded = loaded_fake_model(num_pages=256, model=model)
    return DecodeService(
        DecodeSettings(model=".", **settings),
        loader=lambda _: loaded,
        transports=transports,
        max_unread_tokens=max_unread_tokens,
        drain_timeout_s=drain_timeout_s,
    )


async def cancel(call: asyncio.Future) -> None:
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()


@async_test
async def test_a_prefill_cancelled_in_its_step_frees_its_pages():
    model = FakeModel()
    model.hold()
    prefiller = prefill_service(model)
    async with running(prefiller) as (prefill,), MiniRouter(prefill=prefill) as router:
        call = asyncio.ensure_future(router.prefill("r", PROMPT, params=GREEDY))
        await asyncio.to_thread(model.wait_held)
        await cancel(call)
        await eventually(lambda: not prefiller.leases.leases, "the lease is gone")
        model.release()
        await all_free(prefiller)


@async_test
async def test_a_prefill_cancelled_in_the_queue_is_never_computed():
    model = FakeModel()
    model.hold()
    prefiller = prefill_service(model, max_step_sequences=1)
    async with running(prefiller) as (prefill,), MiniRouter(prefill=prefill) as router:
        first = asyncio.ensure_future(router.prefill("a", PROMPT, params=GREEDY))
        await asyncio.to_thread(model.wait_held)
        queued = asyncio.ensure_future(router.prefill("b", PROMPT, params=GREEDY))
        await eventually(lambda: len(prefiller.leases.leases) == 2, "both are there")
        await cancel(queued)
        await eventually(lambda: len(prefiller.leases.leases) == 1, "one is gone")
        model.release()
        handoff = (await first).handoff
        prefiller.leases.release(handoff.lease.lease_id, incarnation=handoff.holder_incarnation)
        await all_free(prefiller)
        assert model.num_steps == 1


@async_test
async def test_a_higher_attempt_ends_a_lower_one_that_is_being_computed():
    model = FakeModel()
    model.hold()
    async with running(prefill_service(model)) as (prefill,), MiniRouter(prefill=prefill) as router:
        first = asyncio.ensure_future(router.prefill("r", PROMPT, params=GREEDY))
        await asyncio.to_thread(model.wait_held)
        second = asyncio.ensure_future(router.prefill("r", PROMPT, params=GREEDY, attempt=2))
        with pytest.raises(HeadraceError) as raised:
            await first
        assert raised.value.reason == "STALE_ATTEMPT"
        model.release()
        assert (await second).handoff.attempt == 2


@pytest.mark.parametrize("is_cancel_ignored", [False, True], ids=["drains-at-once", "late-bytes"])
@pytest.mark.parametrize("by", ["call", "session", "cancel"])
@async_test
async def test_pages_of_a_cancelled_transfer_are_reused_only_when_drained(by: str, is_cancel_ignored: bool):
    faults = FakeFaults(gate=asyncio.Event(), is_cancel_ignored=is_cancel_ignored)
    assert faults.gate is not None
    prefiller, decoder = prefill_service(), decode_service(transports=["fake"])
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        POOLS["aborts"] = FakePool(prefiller.leases, prefiller.host.model.cache, faults)
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        starting = asyncio.ensure_future(router.start("r", PROMPT, params=GREEDY, handoff=handoff))
        await faults.entered.wait()
        if by == "call":
            await cancel(starting)
        elif by == "session":
            await router.close_session()
        else:
            await router.cancel(1)
        await eventually(lambda: not decoder.num_sequences, "the sequence is gone")
        if is_cancel_ignored:
            assert (await inspect(decoder))[PageState.QUARANTINED] == len(handoff.pages)
            faults.gate.set()
        await all_free(decoder)
        if by != "call":
            with pytest.raises(UnavailableError) as raised:
                await starting
            assert raised.value.reason == {"session": "SESSION_CLOSED", "cancel": "CANCELLED"}[by]


@async_test
async def test_a_transfer_that_never_drains_loses_its_connection():
    faults = FakeFaults(gate=asyncio.Event(), is_cancel_ignored=True)
    prefiller = prefill_service()
    decoder = decode_service(transports=["fake"], drain_timeout_s=0.05)
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        POOLS["aborts"] = FakePool(prefiller.leases, prefiller.host.model.cache, faults)
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        starting = asyncio.ensure_future(router.start("r", PROMPT, params=GREEDY, handoff=handoff))
        await faults.entered.wait()
        await cancel(starting)
        await all_free(decoder)


@async_test
async def test_a_start_cancelled_in_the_queue_frees_nothing_it_does_not_have():
    model = FakeModel()
    prefiller, decoder = prefill_service(), decode_service(model=model, max_step_sequences=1)
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        model.hold(after=1)
        first = (await router.prefill("a", PROMPT, params=ENDLESS)).handoff
        running_first, _ = await router.start("a", PROMPT, params=ENDLESS, handoff=first)
        second = (await router.prefill("b", PROMPT, params=GREEDY)).handoff
        queued = asyncio.ensure_future(router.start("b", PROMPT, params=GREEDY, handoff=second))
        await eventually(lambda: decoder.num_sequences == 2, "both are there")
        await cancel(queued)
        await eventually(lambda: decoder.num_sequences == 1, "one is gone")
        assert not running_first.is_over
        await router.cancel(1)
        model.release()
        await all_free(decoder)


@pytest.mark.parametrize("by", ["session", "cancel"])
@async_test
async def test_a_running_sequence_is_aborted(by: str):
    model = FakeModel()
    prefiller, decoder = prefill_service(), decode_service(model=model)
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        model.hold(after=3)
        handoff = (await router.prefill("r", PROMPT, params=ENDLESS)).handoff
        collected, _ = await router.start("r", PROMPT, params=ENDLESS, handoff=handoff)
        await collected.wait_tokens(3)
        await asyncio.to_thread(model.wait_held)
        await (router.close_session() if by == "session" else router.cancel(1))
        await eventually(lambda: not decoder.num_sequences, "the sequence is gone")
        model.release()
        await all_free(decoder)
        assert not collected.is_over


@async_test
async def test_a_failed_step_ends_its_sequences_and_the_worker_goes_on():
    model = FakeModel()
    prefiller, decoder = prefill_service(), decode_service(model=model)
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        model.hold(after=3)
        handoff = (await router.prefill("a", PROMPT, params=ENDLESS)).handoff
        collected, _ = await router.start("a", PROMPT, params=ENDLESS, handoff=handoff)
        await collected.wait_tokens(3)
        model.failure = RuntimeError("broken")
        model.release()
        await collected.wait_end()
        assert collected.failure is not None
        assert collected.failure.reason == "ENGINE_FAILED"
        model.failure = None
        assert len(await router.generate("b", PROMPT, params=GREEDY)) == 8


@async_test
async def test_a_reader_that_stalls_loses_its_session_and_nobody_else():
    prefiller, decoder = prefill_service(), decode_service(max_unread_tokens=50)
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode, session_id="good") as good,
        MiniRouter(prefill=prefill, decode=decode, session_id="stalled", is_reading=False) as stalled,
    ):
        # Messages large enough to fill the connection's window.
        params = dataclasses.replace(ENDLESS, top_logprobs=20)
        for name in "abcd":
            handoff = (await stalled.prefill(name, PROMPT, params=params)).handoff
            with contextlib.suppress(OverloadedError, NotFoundError):  # the session may be gone by now
                await stalled.start(name, PROMPT, params=params, handoff=handoff)
        await eventually(lambda: not decoder.num_sequences, "the stalled session is aborted")
        assert len(await good.generate("q", PROMPT, params=GREEDY)) == 8
        stalled.read()
        await eventually(lambda: stalled.stream_error is not None, "the stream is refused")
        assert stalled.stream_error is not None
        assert stalled.stream_error.reason == "SLOW_READER"
        assert not any(collected.finish for collected in stalled.outputs.values())


@async_test
async def test_a_start_cancelled_as_it_joins_the_batch_disturbs_nobody():
    model = FakeModel()
    decoder = decode_service(model=model, role="both")
    async with running(decoder) as (decode,), MiniRouter(decode=decode) as router:
        model.hold()  # before there is anything to compute: "other" waits in its first step, and can't end too soon
        other, _ = await router.start("other", PROMPT, params=GREEDY)
        await asyncio.to_thread(model.wait_held)
        router.outputs[99] = Collected()
        spec = SequenceSpec("r", 1, 0, PROMPT, len(PROMPT), ENDLESS)
        starting = asyncio.ensure_future(decoder.start_sequence("session", 99, spec, None))
        await eventually(lambda: decoder.num_sequences == 2, "both are there")
        # Hold the loop still until the news that the sequence runs lies in its queue; then cancel, in the same turn.
        # The engine publishes that it joined before the step in which it does.
        model.hold(after=1)
        model.wait_held()
        starting.cancel()
        model.release()
        await asyncio.wait([starting])
        await other.wait_end()
        assert len(other.token_ids) == 8
