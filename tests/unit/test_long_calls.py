"""Calls between our processes that last: none of them waits for another's, and none is ended for another's sake."""

import asyncio
import importlib
import pkgutil

import headrace.v1
from headrace.v1 import decode_service_pb2 as pb
from headrace.v1.decode_service_pb2_grpc import DecodeServiceStub
from headrace_core import rpc
from headrace_core.door import LONG_CALLS, STREAM_LIMITS
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.testing.fake_worker import FakeWorker

NUM_CALLS = 40


@async_test
async def test_many_sessions_of_one_host_stay_open_side_by_side():
    assert STREAM_LIMITS.readers < NUM_CALLS, "else this shows nothing"
    worker = FakeWorker("decode")
    address = await worker.start()
    async with rpc.channel(address) as channel, asyncio.timeout(WAIT_S):
        stub = DecodeServiceStub(channel)
        calls = [stub.Session() for _ in range(NUM_CALLS)]
        for number, call in enumerate(calls):
            await call.write(pb.SessionRequest(open=pb.OpenSession(router_id=number + 1)))
        for _ in range(3):  # longer than a reader's patience while others wait for a turn
            for call in calls:
                assert isinstance(await call.read(), pb.SessionResponse)
        assert len(worker._sessions) == NUM_CALLS
        for call in calls:
            call.cancel()
    await worker.stop()


def test_every_method_of_ours_that_takes_a_stream_is_named():
    streams = {
        f"/{service.full_name}/{method.name}"
        for info in pkgutil.iter_modules(headrace.v1.__path__, "headrace.v1.")
        if info.name.endswith("_pb2")
        for service in importlib.import_module(info.name).DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if method.client_streaming
    }
    assert streams == set(LONG_CALLS)
