"""What the tests of the door share: a served worker service, and how a call of it fails."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from headrace.v1 import worker_service_pb2 as pb
from headrace.v1 import worker_service_pb2_grpc as pb_grpc
from headrace_core import rpc
from headrace_core.door import Door
from headrace_core.errors import HeadraceError
from headrace_core.shares import Caller

NAME = pb.DESCRIPTOR.services_by_name["WorkerService"].full_name


REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


WAIT_S = 20.0


class Worker(pb_grpc.WorkerServiceServicer):
    """GetInfo answers, WatchLoad streams until `gate` is set, Drain runs `on_drain`."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.on_drain = pb.DrainResponse

    async def GetInfo(self, request, context):
        return pb.GetInfoResponse(num_pages=7)

    async def WatchLoad(self, request, context):
        self.watching = context
        yield pb.WatchLoadResponse(num_running=1)
        await self.gate.wait()

    async def Drain(self, request, context):
        return self.on_drain()


def by_metadata(context):
    """Name callers by what they say; all are at one address."""
    return Caller(dict(context.invocation_metadata()).get("name", "nobody"), "here")


class Served:
    def __init__(self, door):
        self.worker = Worker()
        self.door = door
        self.server = rpc.Server([NAME], door=door)
        pb_grpc.add_WorkerServiceServicer_to_server(self.worker, self.server.grpc)
        self.address = self.server.bind("127.0.0.1:0")

    def silent(self, method, name="nobody"):
        """Open a call that never sends its message."""
        return self.channel.stream_stream(method)(timeout=WAIT_S, metadata=(("name", name),))

    async def info(self):
        return await pb_grpc.WorkerServiceStub(self.channel).GetInfo(pb.GetInfoRequest(), timeout=WAIT_S)

    async def watch(self, name="nobody"):
        """Open a stream and read its first message."""
        stub = pb_grpc.WorkerServiceStub(self.channel)
        call = stub.WatchLoad(pb.WatchLoadRequest(), timeout=WAIT_S, metadata=(("name", name),))
        await call.read()
        return call


@asynccontextmanager
async def served(**options):
    refused = []
    options.setdefault("on_refused", lambda method, error: refused.append((method, error and error.reason)))
    serving = Served(Door(**options))
    serving.refused = refused
    await serving.server.start()
    async with rpc.channel(serving.address) as serving.channel:
        try:
            yield serving
        finally:
            await serving.server.stop(0)


async def failure(call) -> HeadraceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return rpc.raised_from(caught.value)


async def wait_until(is_met):
    async with asyncio.timeout(WAIT_S):
        while not is_met():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.002)
