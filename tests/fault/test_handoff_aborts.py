"""Abort in every phase, from either side: every page comes back, and none before the last byte has landed."""

import asyncio
import dataclasses
import queue

import pytest
from headrace.v1 import decode_service_pb2
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.kv.page_pool import PageState
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.hold_proxy import HoldProxy
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.mini_taker import MiniTaker
from headrace_core.testing.worker_pair import all_free, inspect, running
from headrace_core.transfer.fake import POOLS, FakeFaults, pool_name
from headrace_core.wire import encode_sampling
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True)
ENDLESS = dataclasses.replace(GREEDY, max_tokens=480)
PROMPT = list(range(1, 23))
DECODE = decode_service_pb2.FAILURE_SIDE_DECODE


def prefill_service(model: FakeModel | None = None, *, transports=("grpc",), **settings) -> PrefillService:
    loaded = loaded_fake_model(model=model)
    return PrefillService(PrefillSettings(model=".", **settings), loader=lambda _: loaded, transports=transports)


def decode_service(
    *, transports=(), model: FakeModel | None = None, drain_timeout_s=5.0, num_pages=256, session=None, **settings
):
    loaded = loaded_fake_model(num_pages=num_pages, model=model)
    return DecodeService(
        DecodeSettings(model=".", **settings),
        loader=lambda _: loaded,
        transports=transports,
        drain_timeout_s=drain_timeout_s,
        **(session or {}),
    )


def faults_of(prefiller: PrefillService) -> FakeFaults:
    return POOLS[pool_name(prefiller.host.incarnation)].faults


@async_test
async def test_a_prefill_whose_taker_leaves_in_its_step_frees_its_pages():
    model = FakeModel()
    model.hold()
    prefiller = prefill_service(model)
    async with running(prefiller) as (prefill,), MiniTaker(prefill) as taker:
        ordered = taker.order("r", PROMPT, params=GREEDY)
        await asyncio.to_thread(model.wait_held)
        await ordered.cancel()
        await eventually(lambda: not prefiller.leases.leases, "the lease is gone")
        model.release()
        await all_free(prefiller)


@async_test
async def test_a_prefill_whose_taker_leaves_in_the_queue_is_never_computed():
    model = FakeModel()
    model.hold()
    prefiller = prefill_service(model, max_step_sequences=1)
    async with running(prefiller) as (prefill,), MiniTaker(prefill) as taker:
        first = taker.order("a", PROMPT, params=GREEDY)
        await asyncio.to_thread(model.wait_held)
        queued = taker.order("b", PROMPT, params=GREEDY)
        await eventually(lambda: len(prefiller.leases.leases) == 2, "both are there")
        await queued.cancel()
        await eventually(lambda: len(prefiller.leases.leases) == 1, "one is gone")
        model.release()
        await first.wait_runs()
        await first.confirm()
        await all_free(prefiller)
        assert model.num_steps == 1


@async_test
async def test_a_higher_attempt_ends_a_lower_one_that_is_being_computed():
    model = FakeModel()
    model.hold()
    async with running(prefill_service(model)) as (prefill,), MiniTaker(prefill) as taker:
        first = taker.order("r", PROMPT, params=GREEDY)
        await asyncio.to_thread(model.wait_held)
        second = taker.order("r", PROMPT, params=GREEDY, attempt=2)
        assert (await first.refused()).reason == "STALE_ATTEMPT"
        model.release()
        await second.wait_runs()


PHASES = ("queued", "ordered", "prefilling", "sealing", "pulling", "confirming", "decoding")


async def _reach(phase, model, proxy, faults):
    """Return when the sequence that was just started is in `phase`."""
    if phase in ("prefilling", "decoding"):
        await asyncio.to_thread(model.wait_held)
    elif phase == "ordered":
        await eventually(lambda: bool(proxy.opened), "it is ordered")
    elif phase == "sealing":
        await eventually(lambda: "run" in proxy.seen, "it is sealed, and the taker is not told")
    elif phase == "pulling":
        await faults.entered.wait()
    elif phase == "confirming":
        await eventually(lambda: "confirmed" in proxy.seen, "it is confirmed, and the taker is not told")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("by", ["cancel", "session", "deadline", "attempt", "holder"])
@async_test
async def test_a_sequence_ends_in_every_phase_and_every_page_is_free(phase: str, by: str):
    """`running` looks at every page of both workers at the end."""
    at_prefill, at_decode = FakeModel(), FakeModel()
    prefiller = prefill_service(at_prefill, transports=["fake"])
    decoder = decode_service(model=at_decode, transports=["fake"], max_step_sequences=1, role="both")
    async with (
        running(prefiller, decoder) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        faults = faults_of(prefiller)
        if phase == "pulling":
            faults.gate = asyncio.Event()
        gates = {"ordered": "admitted", "sealing": "run", "confirming": "confirmed"}
        if phase in gates:
            proxy.gates[gates[phase]] = asyncio.Event()
        if phase == "queued":
            at_decode.hold()
            router.start("before", PROMPT, params=ENDLESS, prefill="")
            await asyncio.to_thread(at_decode.wait_held)
        elif phase in ("prefilling", "decoding"):
            (at_prefill if phase == "prefilling" else at_decode).hold()
        timeout_s = 0.5 if by == "deadline" else 60.0
        collected = router.start("r", PROMPT, params=ENDLESS, timeout_s=timeout_s)
        await eventually(lambda: decoder.num_sequences == 1 + (phase == "queued"), "it has begun")
        await _reach(phase, at_decode if phase == "decoding" else at_prefill, proxy, faults)
        if phase == "ordered":
            await eventually(lambda: bool(prefiller.leases.leases), "it has reached the holder")
        num_before = decoder.num_sequences
        match by:
            case "cancel":
                router.cancel(collected)
            case "session":
                await router.close_session()
            case "attempt":
                router.start("r", PROMPT, params=GREEDY, attempt=2, prefill="")
                assert (await collected.wait_failure()).reason == "STALE_ATTEMPT"
            case "deadline":
                assert (await collected.wait_failure()).reason == "DEADLINE_EXCEEDED"
            case _:
                for lease in prefiller.leases.leases:
                    prefiller.leases.abort(lease, _gone())
        if by == "cancel":
            await eventually(lambda: decoder.num_sequences < num_before, "it is gone")
        for model in (at_prefill, at_decode):
            model.release()
        for gate in (*proxy.gates.values(), *([faults.gate] if faults.gate else [])):
            gate.set()
        if by != "session":
            await router.close_session()
        await eventually(lambda: not prefiller.leases.leases, "no lease is left")
        await all_free(prefiller)
        await all_free(decoder)


def _gone():
    from headrace_core.errors import UnavailableError

    return UnavailableError("DRAINING", "made to go away")


@pytest.mark.parametrize("is_cancel_ignored", [False, True], ids=["drains-at-once", "late-bytes"])
@pytest.mark.parametrize("by", ["session", "cancel"])
@async_test
async def test_pages_of_a_cancelled_transfer_are_reused_only_when_drained(by: str, is_cancel_ignored: bool):
    prefiller, decoder = prefill_service(transports=["fake"]), decode_service(transports=["fake"])
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        faults = faults_of(prefiller)
        faults.gate, faults.is_cancel_ignored = asyncio.Event(), is_cancel_ignored
        collected = router.start("r", PROMPT, params=GREEDY)
        await faults.entered.wait()
        await (router.close_session() if by == "session" else _cancelled(router, collected))
        await eventually(lambda: not decoder.num_sequences, "the sequence is gone")
        if is_cancel_ignored:
            await eventually(lambda: not prefiller.leases.leases, "the holder has heard of it")
            assert (await inspect(decoder))[PageState.QUARANTINED] == 6
            faults.gate.set()
        await all_free(decoder)


@async_test
async def test_pages_of_a_sequence_that_ends_before_its_transfer_could_begin_are_free():
    """The engine has set pages aside for it, and the loop, which would take them, hears of its end first."""
    decoder = decode_service(transports=["fake"])
    async with running(decoder):
        session = decoder.open_session(7)
        start = decode_service_pb2.StartSequence(
            sequence_number=1, attempt=1, request_id="r", timeout_ms=60_000, token_ids=PROMPT,
            num_prompt_tokens=len(PROMPT), sampling=encode_sampling(GREEDY), prefill_address="127.0.0.1:1",
        )  # fmt: skip
        decoder.start_sequence(session, start)
        looked: queue.SimpleQueue[int] = queue.SimpleQueue()
        while True:  # without the loop: what the engine tells it meanwhile waits
            decoder.host.engine.submit(lambda scheduler: looked.put(scheduler.pages.pool.num_free))
            if looked.get(timeout=WAIT_S) < decoder.host.model.num_pages:
                break
        decoder.cancel_sequence(session, 1, attempt=1)


async def _cancelled(router, collected):
    router.cancel(collected)


@async_test
async def test_a_transfer_that_never_drains_loses_its_connection():
    prefiller = prefill_service(transports=["fake"])
    decoder = decode_service(transports=["fake"], drain_timeout_s=0.05)
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        faults = faults_of(prefiller)
        faults.gate, faults.is_cancel_ignored = asyncio.Event(), True
        collected = router.start("r", PROMPT, params=GREEDY)
        await faults.entered.wait()
        router.cancel(collected)
        await all_free(decoder)


@async_test
async def test_rule_1_what_waits_for_pages_here_holds_none_there():
    model = FakeModel()
    prefiller, decoder = prefill_service(), decode_service(model=model, num_pages=12)
    async with (
        running(prefiller, decoder) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        model.hold()
        first = router.start("a", PROMPT, params=GREEDY)
        await asyncio.to_thread(model.wait_held)
        second = router.start("b", PROMPT, params=GREEDY)
        await eventually(lambda: decoder.num_sequences == 2, "both are there")
        model.hold(after=1)
        await eventually(lambda: decoder.host.board.report.num_waiting == 1, "it waits for pages")
        assert len(proxy.opened) == 1
        assert not prefiller.leases.leases
        model.release()
        assert len(await first.tokens()) == len(await second.tokens()) == 8


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
        collected = router.start("r", PROMPT, params=ENDLESS)
        await collected.wait_tokens(4)
        await asyncio.to_thread(model.wait_held)
        await (router.close_session() if by == "session" else _cancelled(router, collected))
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
        collected = router.start("a", PROMPT, params=ENDLESS)
        await collected.wait_tokens(4)
        model.failure = RuntimeError("broken")
        model.release()
        assert (await collected.wait_failure()).reason == "ENGINE_FAILED"
        assert collected.side == DECODE
        model.failure = None
        assert len(await router.generate("b", PROMPT, params=GREEDY)) == 8


@async_test
async def test_rule_13_a_reader_that_stalls_pauses_its_rows_then_loses_its_session_and_nobody_else():
    decoder = decode_service(session={"most_unread_bytes": 40_000, "patience_s": 0.5}, num_pages=2048)
    async with (
        running(prefill_service(), decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as good,
        MiniRouter(prefill=prefill, decode=decode, is_reading=False) as stalled,
    ):
        params = dataclasses.replace(ENDLESS, top_logprobs=20)
        for i in range(40):  # more than the connection's windows take
            stalled.start(f"s{i}", PROMPT, params=params)
        await eventually(lambda: bool(decoder.registry.get_sample_value("headrace_paused_sessions")), "it is paused")
        assert len(await good.generate("q", PROMPT, params=GREEDY)) == 8
        await eventually(lambda: decoder.num_sessions == 1, "the stalled session is ended")
        assert not decoder.num_sequences
        stalled.read()
        await eventually(lambda: stalled.stream_error is not None, "the stream is refused")
        assert stalled.stream_error is not None
        assert stalled.stream_error.reason == "SLOW_READER"
        assert not any(collected.finish for collected in stalled.outputs.values())


@async_test
async def test_rule_13_a_reader_that_reads_again_in_time_has_every_token():
    decoder = decode_service(session={"most_unread_bytes": 20_000, "patience_s": 3600.0}, num_pages=2048)
    async with (
        running(prefill_service(), decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as quick,
        MiniRouter(prefill=prefill, decode=decode, is_reading=False) as slow,
    ):
        params = dataclasses.replace(GREEDY, max_tokens=120, top_logprobs=20)
        late = [slow.start(f"s{i}", PROMPT, params=params) for i in range(12)]
        await eventually(lambda: bool(decoder.registry.get_sample_value("headrace_paused_sessions")), "it is paused")
        expected = await quick.generate("q", PROMPT, params=params)
        slow.read()
        assert [await collected.tokens() for collected in late] == [expected] * 12
