"""The boundary: what a handler raises is what the caller sees."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from headrace.v1 import worker_service_pb2 as pb
from headrace.v1 import worker_service_pb2_grpc as pb_grpc
from headrace_core import rpc
from headrace_core.errors import (
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    OverloadedError,
    ProtocolError,
)
from headrace_core.grpc_options import MAX_METADATA_BYTES
from headrace_core.reasons import label
from headrace_core.telemetry import setup_logging
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.garbler import NO_MESSAGE

from tests.unit.raw_http2 import wait_idle_close

NAME = pb.DESCRIPTOR.services_by_name["WorkerService"].full_name


class Worker(pb_grpc.WorkerServiceServicer):
    told = "come back later"

    async def GetInfo(self, request, context):
        raise OverloadedError("QUEUE_FULL", self.told)

    async def WatchLoad(self, request, context):
        yield pb.WatchLoadResponse(num_running=1)
        raise HandoffLostError("LEASE_ENDED", "prefill again")

    async def Drain(self, request, context):
        raise RuntimeError("a secret detail")


async def serve(test):
    server = rpc.Server([NAME])
    pb_grpc.add_WorkerServiceServicer_to_server(Worker(), server.grpc)
    address = server.bind("127.0.0.1:0")
    await server.start()
    try:
        async with rpc.channel(address) as channel:
            await test(server, channel)
    finally:
        await server.stop(0)


def test_metadata_is_bounded_and_what_is_below_the_bound_passes():
    async def test(server, channel):
        stub = pb_grpc.WorkerServiceStub(channel)
        for size in (MAX_METADATA_BYTES, 12 << 10, 15 << 10):  # core's own limits let these pass by chance
            for _ in range(8):
                call = stub.GetInfo(pb.GetInfoRequest(), metadata=(("x", "a" * size),), timeout=WAIT_S)
                assert (await failure(call)).reason == "RESOURCE_EXHAUSTED"
        call = stub.GetInfo(pb.GetInfoRequest(), metadata=(("x", "a" * (MAX_METADATA_BYTES - 1024)),), timeout=WAIT_S)
        assert (await failure(call)).reason == "QUEUE_FULL"

    asyncio.run(serve(test))


async def failure(call) -> HeadraceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return rpc.raised_from(caught.value)


def test_a_raised_error_arrives_as_itself():
    async def test(_, channel):
        error = await failure(pb_grpc.WorkerServiceStub(channel).GetInfo(pb.GetInfoRequest(), timeout=WAIT_S))
        assert (type(error), error.reason, str(error)) == (OverloadedError, "QUEUE_FULL", "come back later")

    asyncio.run(serve(test))


def test_a_stream_delivers_what_came_before_its_error():
    async def test(_, channel):
        call = pb_grpc.WorkerServiceStub(channel).WatchLoad(pb.WatchLoadRequest(), timeout=WAIT_S)
        assert (await call.read()).num_running == 1
        error = await failure(call.read())
        assert (type(error), error.reason) == (HandoffLostError, "LEASE_ENDED")

    asyncio.run(serve(test))


def test_a_bug_is_internal_and_keeps_its_detail_to_the_log(caplog):
    async def test(_, channel):
        error = await failure(pb_grpc.WorkerServiceStub(channel).Drain(pb.DrainRequest(), timeout=WAIT_S))
        assert (type(error), error.reason, str(error)) == (HeadraceError, "BUG", "internal error")

    asyncio.run(serve(test))
    assert "a secret detail" in caplog.text


def test_bytes_that_are_no_message_are_the_callers_error():
    async def test(_, channel):
        error = await failure(channel.unary_unary(f"/{NAME}/Drain")(b"\xff\xff", timeout=WAIT_S))
        assert (type(error), error.reason) == (InvalidRequestError, "BAD_REQUEST")

    asyncio.run(serve(test))


@pytest.mark.parametrize("raised", [HeadraceError("X", "x"), RuntimeError("x")])
def test_an_error_of_a_call_that_grpc_has_ended_but_not_yet_cancelled_is_a_cancellation(raised):
    class Ended:
        async def abort(self, *_):
            raise grpc.aio.InternalError("Failed grpc_call_start_batch")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(rpc._abort(Ended(), "method", raised))


@pytest.mark.timeout(20)
def test_errors_that_are_each_others_cause_and_context_are_forgotten_once():
    error, cause = HeadraceError("X", "x"), ValueError("y")
    error.__cause__, cause.__context__ = cause, error
    rpc._forget_frames(error)


def test_an_answer_that_is_no_message_is_a_protocol_error_and_leaves_no_traceback(capsys):
    setup_logging("router", log_format="text", level="INFO")

    async def test(_, channel):
        stub = pb_grpc.WorkerServiceStub(channel)
        with pytest.raises(ProtocolError) as caught:
            rpc.answered(await stub.GetInfo(pb.GetInfoRequest(), timeout=WAIT_S))
        assert caught.value.reason == "PROTOCOL"

    async def no_message(request, context):
        return NO_MESSAGE

    async def main():
        server = grpc.aio.server()
        handlers = {"GetInfo": grpc.unary_unary_rpc_method_handler(no_message)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with rpc.channel(f"127.0.0.1:{port}") as channel:
            await test(server, channel)
        await server.stop(0)

    asyncio.run(main())
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("reason", ["", "lower", "A" * 65, "A\nB", "\u00ff", "_A", "A B"])
def test_a_peers_reason_that_is_none_is_the_statuss_name(reason):
    assert rpc.from_status(grpc.StatusCode.ABORTED, reason, "x").reason == "ABORTED"


@pytest.mark.parametrize(
    "told", ["x" * 100_000, "\U0001f600" * 100_000, "bad \udcff"], ids=["ascii", "emoji", "surrogate"]
)
def test_a_message_that_no_status_can_carry_arrives_cut_and_with_its_reason(monkeypatch, told):
    monkeypatch.setattr(Worker, "told", told)

    async def test(_, channel):
        error = await failure(pb_grpc.WorkerServiceStub(channel).GetInfo(pb.GetInfoRequest(), timeout=WAIT_S))
        assert (type(error), error.reason) == (OverloadedError, "QUEUE_FULL")
        assert 3 < len(str(error).encode()) <= 2000

    asyncio.run(serve(test))


def test_a_reason_that_nobody_knows_makes_no_label_of_its_own():
    assert (label("CHECKSUM"), label("INVENTED")) == ("CHECKSUM", "OTHER")


def test_an_absent_server_is_unavailable():
    async def test():
        async with rpc.channel("127.0.0.1:1") as channel:
            error = await failure(pb_grpc.WorkerServiceStub(channel).GetInfo(pb.GetInfoRequest(), timeout=WAIT_S))
        assert error.reason == "UNAVAILABLE"

    asyncio.run(test())


def test_health_follows_readiness():
    async def test(server, channel):
        health = health_pb2_grpc.HealthStub(channel)
        for is_ready, status in [(None, "NOT_SERVING"), (True, "SERVING"), (False, "NOT_SERVING")]:
            if is_ready is not None:
                await server.set_ready(is_ready)
            for name in ("", NAME):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=WAIT_S)
                assert health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == status

    asyncio.run(serve(test))


def test_an_idle_connection_is_closed_a_stream_is_not_idle_and_a_channel_connects_again(monkeypatch):
    monkeypatch.setattr(rpc, "MAX_IDLE_MS", 100)
    gate = asyncio.Event()

    class Idle(Worker):
        async def WatchLoad(self, request, context):
            yield pb.WatchLoadResponse(num_running=1)
            await gate.wait()
            yield pb.WatchLoadResponse(num_running=2)

    async def main():
        server = rpc.Server([NAME])
        pb_grpc.add_WorkerServiceServicer_to_server(Idle(), server.grpc)
        address = server.bind("127.0.0.1:0")
        await server.start()
        own = [("grpc.use_local_subchannel_pool", 1)]  # or the two channels would share a connection
        async with rpc.channel(address) as channel, grpc.aio.insecure_channel(address, options=own) as streaming:
            call = pb_grpc.WorkerServiceStub(streaming).WatchLoad(pb.WatchLoadRequest(), timeout=WAIT_S)
            assert (await call.read()).num_running == 1
            for _ in range(3):
                health = health_pb2_grpc.HealthStub(channel)
                await health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
                await asyncio.to_thread(wait_idle_close, address)
                async with asyncio.timeout(WAIT_S):
                    while channel.get_state() is not grpc.ChannelConnectivity.IDLE:  # noqa: ASYNC110 - no event
                        await asyncio.sleep(0.01)
            gate.set()
            assert (await call.read()).num_running == 2
        await server.stop(0)

    asyncio.run(main())


def test_a_channel_of_ours_disconnects_before_the_server_does():
    """grpc's client would write a line to standard error; its own limit takes from the time set to twice that."""
    assert 2 * dict(rpc.CHANNEL_OPTIONS)["grpc.client_idle_timeout_ms"] < rpc.MAX_IDLE_MS


def test_reflection_lists_the_service():
    async def test(_, channel):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]), timeout=WAIT_S)
        async for answer in call:
            assert NAME in {service.name for service in answer.list_services_response.service}

    asyncio.run(serve(test))


def test_an_address_in_use_is_named():
    async def test(server, _):
        address = server.bind("127.0.0.1:0")
        with pytest.raises(HeadraceError, match=address):
            rpc.Server([NAME]).bind(address)

    asyncio.run(serve(test))
