"""The prefill worker over real gRPC with the fake model."""

import asyncio
import dataclasses

import grpc.aio
import pytest
from headrace.v1 import (
    transfer_service_pb2,
    transfer_service_pb2_grpc,
    types_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from headrace_core.config import PrefillSettings
from headrace_core.errors import HandoffLostError, HeadraceError, InvalidRequestError, OverloadedError, UnavailableError
from headrace_core.request import SamplingParams
from headrace_core.rpc import channel
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import running
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=24, ignore_eos=True)
PROMPT = list(range(1, 11))


def service(*, loaded=None, **settings) -> PrefillService:
    loaded = loaded or loaded_fake_model()
    return PrefillService(PrefillSettings(model=".", **settings), loader=lambda _: loaded)


async def release(address: str, handoff: types_pb2.Handoff) -> None:
    async with channel(address) as open_channel:
        stub = transfer_service_pb2_grpc.TransferServiceStub(open_channel)
        await stub.ReleaseLease(
            transfer_service_pb2.ReleaseLeaseRequest(
                lease_id=handoff.lease.lease_id, holder_incarnation=handoff.holder_incarnation
            ),
            timeout=WAIT_S,
        )


@async_test
async def test_any_protobuf_client_can_pull_renew_and_release():
    loaded = loaded_fake_model()
    async with (
        running(service(loaded=loaded, frame_kib=4)) as (address,),
        MiniRouter(prefill=address) as router,
        channel(address) as open_channel,
    ):
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        stub = transfer_service_pb2_grpc.TransferServiceStub(open_channel)
        fence = {"lease_id": handoff.lease.lease_id, "holder_incarnation": handoff.holder_incarnation}
        request = transfer_service_pb2.PullRequest(
            **fence, attempt=1, first_layer=1, num_layers=1, tokens_sha256=handoff.tokens_sha256
        )
        got = b"".join([message.payload async for message in stub.Pull(request, timeout=WAIT_S)])
        assert got == b"".join(bytes(loaded.cache.page_bytes(1, page.page_id)) for page in handoff.pages)
        renewed = await stub.RenewLease(transfer_service_pb2.RenewLeaseRequest(**fence), timeout=WAIT_S)
        assert renewed.duration_ms == handoff.lease.duration_ms == 30_000
        for _ in range(2):  # idempotent
            await stub.ReleaseLease(transfer_service_pb2.ReleaseLeaseRequest(**fence), timeout=WAIT_S)


@async_test
async def test_an_attempt_is_cancelled_by_its_name_and_a_later_one_is_not():
    prefiller = service()
    async with running(prefiller) as (address,), MiniRouter(prefill=address) as router:
        await router.prefill("r", PROMPT, params=GREEDY, attempt=2)
        await router.cancel_prefill("r", attempt=1)
        assert prefiller.leases.num_held == 1
        for _ in range(2):  # idempotent
            await router.cancel_prefill("r", attempt=2)
            assert prefiller.leases.num_held == 0
        await router.cancel_prefill("unknown", attempt=1)


@pytest.mark.parametrize(
    ("replaces", "reason"), [(False, "CANCELLED"), (True, "STALE_ATTEMPT")], ids=["cancelled", "replaced"]
)
@async_test
async def test_a_prefill_that_is_ended_under_way_is_told_what_ended_it(replaces: bool, reason: str):
    model = FakeModel()
    model.hold()
    async with (
        running(service(loaded=loaded_fake_model(model=model))) as (address,),
        MiniRouter(prefill=address) as router,
    ):
        first = asyncio.ensure_future(router.prefill("r", PROMPT, params=GREEDY, attempt=1))
        await asyncio.to_thread(model.wait_held)
        second = asyncio.ensure_future(router.prefill("r", PROMPT, params=GREEDY, attempt=2)) if replaces else None
        if second is None:
            await router.cancel_prefill("r", attempt=1)
        with pytest.raises(HeadraceError) as raised:
            await first
        assert raised.value.reason == reason
        model.release()
        if second is not None:
            await release(address, (await second).handoff)


@async_test
async def test_slots_past_the_prompt_are_zero_on_the_wire():
    loaded = loaded_fake_model()
    async with running(service(loaded=loaded)) as (address,), MiniRouter(prefill=address) as router:
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        last = bytes(loaded.cache.page_bytes(0, handoff.pages[-1].page_id))
        assert any(last[:32])
        assert not any(last[32:])
        await release(address, handoff)


@async_test
async def test_a_sequence_that_ends_at_once_holds_nothing():
    params = dataclasses.replace(GREEDY, max_tokens=1)
    async with running(service()) as (address,), MiniRouter(prefill=address) as router:
        response = await router.prefill("r", PROMPT, params=params)
        assert response.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert not response.handoff.lease.lease_id
        assert not response.handoff.pages


@async_test
async def test_a_higher_attempt_replaces_a_lower_one_and_a_lower_one_is_refused():
    async with running(service()) as (address,), MiniRouter(prefill=address) as router:
        await router.prefill("r", PROMPT, params=GREEDY, attempt=1)
        second = (await router.prefill("r", PROMPT, params=GREEDY, attempt=2)).handoff
        with pytest.raises(HandoffLostError) as raised:
            await router.prefill("r", PROMPT, params=GREEDY, attempt=1)
        assert raised.value.reason == "STALE_ATTEMPT"
        await release(address, second)


@async_test
async def test_samples_of_one_request_do_not_replace_each_other():
    async with running(service()) as (address,), MiniRouter(prefill=address) as router:
        responses = [await router.prefill("r", PROMPT, params=GREEDY, sample_index=i) for i in range(2)]
        assert [response.num_cached_tokens for response in responses] == [0, 8]
        for response in responses:
            await release(address, response.handoff)


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
    async with running(service()) as (address,), MiniRouter(prefill=address) as router:
        with pytest.raises(InvalidRequestError) as raised:
            await router.prefill(**call)
        assert raised.value.reason == reason


@async_test
async def test_a_prompt_larger_than_the_pool_is_refused():
    async with (
        running(service(loaded=loaded_fake_model(num_pages=2))) as (address,),
        MiniRouter(prefill=address) as router,
    ):
        with pytest.raises(OverloadedError) as raised:
            await router.prefill("r", PROMPT, params=GREEDY)
        assert raised.value.reason == "NO_FREE_PAGES"


@async_test
async def test_a_step_that_raises_fails_its_sequences_and_the_worker_goes_on(caplog):
    model = FakeModel()
    async with (
        running(service(loaded=loaded_fake_model(model=model))) as (address,),
        MiniRouter(prefill=address) as router,
    ):
        model.failure = RuntimeError("broken")
        with pytest.raises(HeadraceError) as raised:
            await router.prefill("r", PROMPT, params=GREEDY)
        assert raised.value.reason == "ENGINE_FAILED"
        model.failure = None
        await release(address, (await router.prefill("r", PROMPT, params=GREEDY)).handoff)


@async_test
async def test_a_draining_worker_refuses_work_and_waits_for_its_leases():
    worker = service()
    async with running(worker) as (address,), MiniRouter(prefill=address) as router, channel(address) as open_channel:
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        stub = worker_service_pb2_grpc.WorkerServiceStub(open_channel)
        await stub.Drain(worker_service_pb2.DrainRequest(), timeout=WAIT_S)
        with pytest.raises(UnavailableError) as raised:
            await router.prefill("q", PROMPT, params=GREEDY)
        assert raised.value.reason == "DRAINING"
        draining = asyncio.ensure_future(worker.drain())
        await release(address, handoff)
        await draining


@async_test
async def test_load_and_identity_are_told():
    worker = service()
    async with running(worker) as (address,), MiniRouter(prefill=address) as router, channel(address) as open_channel:
        stub = worker_service_pb2_grpc.WorkerServiceStub(open_channel)
        info = await stub.GetInfo(worker_service_pb2.GetInfoRequest(), timeout=WAIT_S)
        assert (info.role, info.num_pages, info.vocab_size) == (types_pb2.WORKER_ROLE_PREFILL, 64, 97)
        assert info.incarnation == worker.host.incarnation
        watch = stub.WatchLoad(worker_service_pb2.WatchLoadRequest(min_interval_ms=1))
        assert (await watch.read()).num_free_pages == 64
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        async with asyncio.timeout(WAIT_S):
            while (report := await watch.read()).num_leases != 1:
                pass
        assert report.num_free_pages == 61
        await release(address, handoff)
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
