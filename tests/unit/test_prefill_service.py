"""The prefill worker over real gRPC with the fake model."""

import asyncio
import dataclasses

import grpc.aio
import pytest
from headrace.v1 import (
    hold_service_pb2,
    hold_service_pb2_grpc,
    transfer_service_pb2,
    transfer_service_pb2_grpc,
    types_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from headrace_core.config import PrefillSettings
from headrace_core.errors import InvalidRequestError
from headrace_core.kv.page_hash import page_hashes
from headrace_core.request import FinishReason, SamplingParams, hash_tokens
from headrace_core.rpc import channel, raised_from
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.mini_taker import MiniTaker
from headrace_core.testing.worker_pair import running
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=24, ignore_eos=True)
PROMPT = list(range(1, 11))


def service(*, loaded=None, **settings) -> PrefillService:
    loaded = loaded or loaded_fake_model()
    return PrefillService(PrefillSettings(model=".", **settings), loader=lambda _: loaded)


@async_test
async def test_any_protobuf_client_can_pull_what_is_sealed():
    loaded = loaded_fake_model()
    async with (
        running(service(loaded=loaded, frame_kib=4)) as (address,),
        MiniTaker(address) as taker,
        channel(address) as open_channel,
    ):
        ordered = taker.order("r", PROMPT, params=GREEDY)
        admission, runs = await ordered.wait_admitted(), await ordered.wait_all()
        (shard,) = admission.shards
        assert (shard.endpoint, shard.first_layer, shard.num_layers) == (address, 0, 2)
        stub = transfer_service_pb2_grpc.TransferServiceStub(open_channel)
        for run in runs:
            request = transfer_service_pb2.PullRequest(
                lease_key=admission.lease_key,
                incarnation=shard.incarnation,
                first_layer=1,
                num_layers=1,
                first_page=run.first_page,
                num_pages=run.num_pages,
                tokens_sha256=hash_tokens(PROMPT),
            )
            got = b"".join([message.payload async for message in stub.Pull(request, timeout=WAIT_S)])
            assert got == b"".join(bytes(loaded.cache.page_bytes(1, page_id)) for page_id in run.page_ids)


@async_test
async def test_the_first_token_says_whose_it_is():
    async with running(service()) as (address,), MiniTaker(address) as taker:
        ordered = taker.order("r", PROMPT, params=GREEDY, sample_index=3)
        first = await ordered.wait_first()
        assert (first.num_tokens, first.tokens_sha256) == (len(PROMPT), hash_tokens(PROMPT))
        assert (first.seed, first.sample_index, first.finish) == (1, 3, None)


@async_test
async def test_slots_past_the_prompt_are_zero_on_the_wire():
    loaded = loaded_fake_model()
    async with running(service(loaded=loaded)) as (address,), MiniTaker(address) as taker:
        runs = await taker.order("r", PROMPT, params=GREEDY).wait_all()
        last = bytes(loaded.cache.page_bytes(0, runs[-1].page_ids[-1]))
        assert any(last[:32])
        assert not any(last[32:])


@async_test
async def test_a_sequence_that_ends_at_once_is_held_until_its_taker_heard_it():
    params = dataclasses.replace(GREEDY, max_tokens=1)
    worker = service()
    async with running(worker) as (address,), MiniTaker(address) as taker:
        ordered = taker.order("r", PROMPT, params=params)
        assert (await ordered.wait_first()).finish is FinishReason.LENGTH
        assert worker.leases.leases, "what it was told of may be read until it leaves"
        await ordered.cancel()
        await eventually(lambda: not worker.leases.leases, "it left")
        ends = worker.registry.get_sample_value("headrace_lease_ends_total", {"outcome": "taken"})
        assert ends == 1


@async_test
async def test_samples_of_one_request_do_not_replace_each_other():
    async with running(service()) as (address,), MiniTaker(address) as taker:
        cached = []
        for index in range(2):
            ordered = taker.order("r", PROMPT, params=GREEDY, sample_index=index)
            await ordered.wait_all()
            cached.append((await ordered.wait_admitted()).num_cached_tokens)
        assert cached == [0, 8]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_ids": []}, "EMPTY_PROMPT"),
        ({"token_ids": [97]}, "BAD_TOKEN"),
        ({"token_ids": [1] * 512}, "PROMPT_TOO_LONG"),
        ({"request_id": "not an id"}, "BAD_REQUEST"),
        ({"attempt": 0}, "BAD_REQUEST"),
        ({"num_prompt_tokens": 99}, "BAD_REQUEST"),
        ({"params": SamplingParams(temperature=0.0)}, "BAD_SAMPLING"),
        ({"params": SamplingParams(seed=1, temperature=-1.0)}, "BAD_SAMPLING"),
        ({"params": SamplingParams(seed=1, stop_token_ids=(97,))}, "BAD_TOKEN"),
    ],
)
@async_test
async def test_bad_input_is_refused_by_name(change, reason):
    call = {"request_id": "r", "token_ids": PROMPT, "params": GREEDY, **change}
    async with running(service()) as (address,), MiniTaker(address) as taker:
        error = await taker.order(**call).refused()
        assert (type(error), error.reason) == (InvalidRequestError, reason)


@pytest.mark.parametrize(
    "messages",
    [[], [hold_service_pb2.HoldRequest()], [hold_service_pb2.HoldRequest(confirm=hold_service_pb2.Confirm())]],
    ids=["nothing", "a beat", "a confirmation"],
)
@async_test
async def test_a_call_that_does_not_say_what_it_wants_is_refused(messages):
    async with running(service()) as (address,), channel(address) as open_channel:
        stub = hold_service_pb2_grpc.HoldServiceStub(open_channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in stub.Hold(iter(messages), timeout=WAIT_S):
                pass
        assert raised_from(raised.value).reason == "BAD_REQUEST"


@async_test
async def test_a_prompt_larger_than_the_pool_is_refused():
    worker = service(loaded=loaded_fake_model(num_pages=2))
    async with running(worker) as (address,), MiniTaker(address) as taker:
        assert (await taker.order("r", PROMPT, params=GREEDY).refused()).reason == "NO_FREE_PAGES"


@async_test
async def test_a_step_that_raises_fails_its_sequences_and_the_worker_goes_on():
    model = FakeModel()
    async with (
        running(service(loaded=loaded_fake_model(model=model))) as (address,),
        MiniTaker(address) as taker,
    ):
        model.failure = RuntimeError("broken")
        assert (await taker.order("r", PROMPT, params=GREEDY).refused()).reason == "ENGINE_FAILED"
        model.failure = None
        await taker.order("s", PROMPT, params=GREEDY).wait_all()


@async_test
async def test_a_draining_worker_refuses_work_and_waits_for_its_leases():
    worker = service()
    async with running(worker) as (address,), MiniTaker(address) as taker, channel(address) as open_channel:
        ordered = taker.order("r", PROMPT, params=GREEDY)
        await ordered.wait_all()
        stub = worker_service_pb2_grpc.WorkerServiceStub(open_channel)
        await stub.Drain(worker_service_pb2.DrainRequest(), timeout=WAIT_S)
        assert (await taker.order("q", PROMPT, params=GREEDY).refused()).reason == "DRAINING"
        draining = asyncio.ensure_future(worker.drain())
        await ordered.confirm()
        await draining


@async_test
async def test_load_and_identity_are_told():
    worker = service()
    async with running(worker) as (address,), MiniTaker(address) as taker, channel(address) as open_channel:
        stub = worker_service_pb2_grpc.WorkerServiceStub(open_channel)
        info = await stub.GetInfo(worker_service_pb2.GetInfoRequest(), timeout=WAIT_S)
        assert (info.role, info.num_pages, info.vocab_size) == (types_pb2.WORKER_ROLE_PREFILL, 64, 97)
        assert info.incarnation == worker.host.incarnation
        watch = stub.WatchLoad(worker_service_pb2.WatchLoadRequest(min_interval_ms=1))
        assert (await watch.read()).num_free_pages == 64
        await taker.order("r", PROMPT, params=GREEDY).wait_all()
        async with asyncio.timeout(WAIT_S):
            while (report := await watch.read()).num_leases != 1:
                pass
        assert report.num_free_pages == 61
        watch.cancel()


@async_test
async def test_work_is_refused_while_the_model_loads():
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(_):
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(WAIT_S)
        return loaded_fake_model()

    worker = PrefillService(PrefillSettings(model="."), loader=slow)
    starting = asyncio.ensure_future(worker.start())
    await eventually(lambda: bool(worker.host.address), "the worker is bound")
    async with channel(worker.host.address) as open_channel:
        stub = worker_service_pb2_grpc.WorkerServiceStub(open_channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.GetInfo(worker_service_pb2.GetInfoRequest(), timeout=WAIT_S, wait_for_ready=True)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        gate.set()
        await starting
        await stub.GetInfo(worker_service_pb2.GetInfoRequest(), timeout=WAIT_S)
    await worker.stop()


@async_test
async def test_pages_that_can_not_be_told_of_end_their_call_and_do_not_hang_it():
    prefiller = service()
    async with running(prefiller) as (address,), MiniTaker(address) as taker:
        assert prefiller._holder is not None
        sealer = prefiller._holder._sealer
        seal = sealer.seal

        async def unspeakable(first_page, pages, *which):
            return dataclasses.replace(await seal(first_page, pages, *which), generations=(-1,) * len(pages))

        sealer.seal = unspeakable
        assert (await taker.order("r", PROMPT, params=GREEDY).refused()).reason == "BUG"


@async_test
async def test_a_watcher_hears_which_pages_of_a_prompt_are_cached():
    loaded = loaded_fake_model()
    async with (
        running(service(loaded=loaded)) as (address,),
        MiniTaker(address) as taker,
        channel(address) as open_channel,
    ):
        stub = worker_service_pb2_grpc.WorkerServiceStub(open_channel)
        reports = stub.WatchLoad(worker_service_pb2.WatchLoadRequest(min_interval_ms=1))
        cached: set[int] = set()
        wanted = set(page_hashes(PROMPT, loaded.layout.page_size))
        assert wanted
        await taker.order("r", PROMPT, params=GREEDY).wait_first()
        async with asyncio.timeout(WAIT_S):
            while not wanted <= cached:
                report = await reports.read()
                cached = set(report.pages_cached) | (set() if report.is_cache_whole else cached)
        reports.cancel()
