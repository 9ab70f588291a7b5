"""The door of a server: what is refused before its message is read, and what the others have of it."""

import asyncio
import gc
import weakref

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from headrace.v1 import worker_service_pb2 as pb
from headrace.v1 import worker_service_pb2_grpc as pb_grpc
from headrace_core.door import MethodLimits, address_of
from headrace_core.errors import HeadraceError, InvalidRequestError, OverloadedError, UnavailableError

from tests.unit.door_parts import NAME, REFLECTION, WAIT_S, by_metadata, failure, served, wait_until
from tests.unit.raw_http2 import INITIAL_WINDOW_SIZE, call_without_window, settings_of

INFO, LOAD, DRAIN = (f"/{NAME}/{method}" for method in ("GetInfo", "WatchLoad", "Drain"))


def test_a_guard_refuses_before_a_message_is_sent():
    def guard(call):
        raise UnavailableError("DRAINING", f"no {call.method}")

    async def test():
        async with served(guards=[guard]) as serving:
            for method in (INFO, LOAD):
                error = await failure(serving.silent(method).read())
                assert (type(error), error.reason, str(error)) == (UnavailableError, "DRAINING", f"no {method}")
            assert serving.refused == [(INFO, "DRAINING"), (LOAD, "DRAINING")]

    asyncio.run(test())


def test_a_place_is_taken_before_a_guard_is_asked():
    asked = []

    def guard(call):
        asked.append(call.method)

    async def test():
        async with served(guards=[guard], methods={LOAD: MethodLimits(open_calls=1)}) as serving:
            await serving.watch()
            assert (await failure(serving.silent(LOAD).read())).reason == "QUEUE_FULL"
            assert asked == [LOAD]

    asyncio.run(test())


def test_a_guard_stays_until_the_message_is_read_and_no_longer():
    inside = []

    def guard(call):
        inside.append(call.method)
        return lambda: inside.remove(call.method)

    async def test():
        async with served(guards=[guard], limits=MethodLimits(message_timeout_s=WAIT_S)) as serving:
            await serving.watch()
            assert inside == []
            call = serving.silent(LOAD)
            await wait_until(lambda: inside == [LOAD])
            await call.write(b"")
            await call.read()
            assert inside == []

    asyncio.run(test())


def test_a_message_that_never_comes_ends_the_call():
    async def test():
        async with served(methods={INFO: MethodLimits(message_timeout_s=0.05)}) as serving:
            error = await failure(serving.silent(INFO).read())
            assert (type(error), error.reason) == (OverloadedError, "MESSAGE_TIMEOUT")
            assert serving.refused == [(INFO, "MESSAGE_TIMEOUT")]
            await wait_until(lambda: places(serving, INFO) == 0)

    asyncio.run(test())


def test_calls_past_their_callers_share_are_refused_at_once_and_others_still_come_in():
    async def test():
        async with served(methods={LOAD: MethodLimits(open_calls=8)}, caller_of=by_metadata) as serving:
            held = [await serving.watch("greedy") for _ in range(4)]
            error = await failure(serving.silent(LOAD, "greedy").read())
            assert (type(error), error.reason) == (OverloadedError, "QUEUE_FULL")
            assert error.retry_after_s > 0
            other = await serving.watch("modest")
            held[0].cancel()
            other.cancel()
            await wait_until(lambda: places(serving, LOAD) == 3)
            await serving.watch("greedy")

    asyncio.run(test())


def places(serving, method):
    """Return how many calls of a method are open."""
    room = serving.door._rooms.get(method)
    return room.places.taken if room else 0


def test_every_way_a_call_ends_gives_its_place_back():
    def fail():
        raise HeadraceError("X", "x")

    def break_down():
        raise RuntimeError("x")

    async def test():
        async with served() as serving:
            stub = pb_grpc.WorkerServiceStub(serving.channel)
            await stub.Drain(pb.DrainRequest(), timeout=WAIT_S)
            for serving.worker.on_drain in (fail, break_down):
                await failure(stub.Drain(pb.DrainRequest(), timeout=WAIT_S))
            await failure(serving.channel.unary_unary(DRAIN)(b"\xff\xff", timeout=WAIT_S))
            left = serving.silent(DRAIN)
            await wait_until(lambda: places(serving, DRAIN) == 1)
            left.cancel()
            await wait_until(lambda: places(serving, DRAIN) == 0)
            (await serving.watch()).cancel()
            unread = stub.WatchLoad(pb.WatchLoadRequest(), timeout=WAIT_S)
            await wait_until(lambda: places(serving, LOAD) == 1)
            unread.cancel()
            await wait_until(lambda: places(serving, LOAD) == 0)
            for room in serving.door._rooms.values():
                assert (room.messages.taken, room.turns._pot.taken, room.turns._begun) == (0, 0, {})

    asyncio.run(test())


def test_what_open_calls_sent_is_bounded():
    async def test():
        async with served(methods={LOAD: MethodLimits(message_bytes=1000)}, caller_of=by_metadata) as serving:
            message = b"\x7a\x8d\x03" + bytes(397)  # a field that nobody knows

            async def opened(name):
                metadata = (("name", name),)
                call = serving.channel.unary_stream(LOAD)(message, timeout=WAIT_S, metadata=metadata)
                await call.read()
                return call

            first = await opened("ann")
            error = await failure(opened("ann"))
            assert (type(error), error.reason) == (OverloadedError, "QUEUE_FULL")
            assert "400 bytes of messages are held" in str(error)
            await opened("bob")
            first.cancel()
            await wait_until(lambda: serving.door._rooms[LOAD].messages.taken == 400)
            await opened("ann")

    asyncio.run(test())


def test_calls_that_send_nothing_keep_nobody_from_being_read_and_health_from_nothing():
    async def test():
        async with served(limits=MethodLimits(readers=2, message_timeout_s=WAIT_S, patience_s=1.0)) as serving:
            silent = [serving.silent(INFO) for _ in range(20)]
            await wait_until(lambda: places(serving, INFO) == 20)
            health = health_pb2_grpc.HealthStub(serving.channel)
            await health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            # One turn is the silent calls', who all are this caller: it ends early, because somebody waits.
            assert (await serving.info()).num_pages == 7
            for call in silent:
                call.cancel()

    asyncio.run(test())


async def asked(call, num_bytes=0):
    """Ask reflection for something of so many bytes, and wait for its answer."""
    await call.write(reflection_pb2.ServerReflectionRequest(file_by_filename="x" * num_bytes).SerializeToString())
    return await call.read()


def test_a_stream_of_messages_waits_for_a_turn_before_each():
    async def test():
        async with served() as serving:
            calls = [serving.silent(REFLECTION) for _ in range(24)]
            await wait_until(lambda: places(serving, REFLECTION) == 24)
            turns = serving.door._rooms[REFLECTION].turns
            await wait_until(lambda: turns._pot.taken == 1)
            assert sum(map(len, turns._lines.values())) == 23
            for call in calls:
                call.cancel()
            await wait_until(lambda: (turns._pot.taken, turns._lines) == (0, {}))

    asyncio.run(test())


def test_a_stream_whose_next_message_does_not_come_ends():
    async def test():
        async with served(methods={REFLECTION: MethodLimits(message_timeout_s=0.2)}) as serving:
            call = serving.silent(REFLECTION)
            await asked(call)
            assert (await failure(call.read())).reason == "MESSAGE_TIMEOUT"
            assert serving.refused == [(REFLECTION, "MESSAGE_TIMEOUT")]

    asyncio.run(test())


def test_the_messages_of_a_stream_are_small_and_counted_one_at_a_time():
    async def test():
        async with served() as serving:
            call = serving.silent(REFLECTION)
            for _ in range(40):
                assert await asked(call, 60_000) is not grpc.aio.EOF
                assert serving.door._rooms[REFLECTION].messages.taken <= 60_100
            error = await failure(asked(call, 70_000))
            assert (type(error), error.reason) == (InvalidRequestError, "BAD_REQUEST")
            await wait_until(lambda: serving.door._rooms[REFLECTION].messages.taken == 0)

    asyncio.run(test())


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_that_grpc_does_not_take_leaves_no_traceback_and_counts_as_a_call_that_ended(caplog, compression):
    async def test():
        async with served() as serving:
            for method in (DRAIN, LOAD, REFLECTION):
                options = [("grpc.max_send_message_length", -1)]
                async with grpc.aio.insecure_channel(serving.address, options=options) as channel:
                    call = channel.unary_stream(method)(bytes(9 << 20), timeout=WAIT_S, compression=compression)
                    error = await failure(call.read())
                assert error.reason == "RESOURCE_EXHAUSTED"
                await wait_until(lambda method=method: places(serving, method) == 0)
            assert serving.refused == [(DRAIN, None), (LOAD, None)]

    asyncio.run(test())
    gc.collect()
    assert not caplog.records


def test_a_call_without_a_message_is_a_bad_request():
    async def test():
        async with served() as serving:
            call = serving.silent(DRAIN)
            await call.done_writing()
            assert (await failure(call.read())).reason == "BAD_REQUEST"
            assert serving.refused == [(DRAIN, "BAD_REQUEST")]

    asyncio.run(test())


def test_a_message_can_be_forgotten_before_its_call_ends():
    async def test():
        async with served() as serving:
            message = b"\x7a\x8d\x03" + bytes(397)
            call = serving.channel.unary_stream(LOAD)(message, timeout=WAIT_S)
            await call.read()
            messages = serving.door._rooms[LOAD].messages
            assert messages.taken == 400
            for _ in range(2):
                serving.door.forget_message(serving.worker.watching)
                assert messages.taken == 0
            call.cancel()
            await wait_until(lambda: places(serving, LOAD) == 0)
            assert (messages.taken, serving.door._messages) == (0, {})

    asyncio.run(test())


def test_a_burst_of_calls_is_served_to_the_last_one():
    async def test():
        async with served() as serving:
            answers = await asyncio.gather(*(serving.info() for _ in range(1600)))
            assert {answer.num_pages for answer in answers} == {7}

    asyncio.run(test())


def test_an_unread_message_stays_with_its_sender():
    """By HTTP/2's own rule: what the server lets a caller send before it reads is one small window."""

    async def test():
        async with served() as serving:
            settings = await asyncio.to_thread(settings_of, serving.address)
            assert settings[INITIAL_WINDOW_SIZE] == 16 << 10

    asyncio.run(test())


def test_an_error_does_not_keep_the_request_it_is_about():
    class Large:
        pass

    made = []

    def fail():
        large = Large()
        made.append(weakref.ref(large))
        raise HeadraceError("X", "x")

    async def test():
        async with served() as serving:
            serving.worker.on_drain = fail
            stub = pb_grpc.WorkerServiceStub(serving.channel)
            await failure(stub.Drain(pb.DrainRequest(), timeout=WAIT_S))
            await wait_until(lambda: made[0]() is None)

    gc.disable()
    try:
        asyncio.run(test())
    finally:
        gc.enable()


def test_a_watcher_that_reads_nothing_holds_up_no_change_of_health():
    async def test():
        async with served() as serving:
            await serving.server.set_ready(True)
            watcher = await asyncio.to_thread(call_without_window, serving.address, "/grpc.health.v1.Health/Watch", b"")
            await wait_until(lambda: places(serving, "/grpc.health.v1.Health/Watch") == 1)
            async with asyncio.timeout(WAIT_S):
                for _ in range(3):
                    await serving.server.set_ready(False)
                    await serving.server.set_ready(True)
                await serving.server.set_ready(False)
            health = health_pb2_grpc.HealthStub(serving.channel)
            assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)).status == 2
            watcher.close()

    asyncio.run(test())


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.1.2.3:4567", "10.1.2.3"),
        ("ipv6:%5B2001:db8:1:2:3::4%5D:9", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::77]:10", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:10.1.2.3%5D:4567", "10.1.2.3"),
        ("ipv6:%5Bfe80::1%25eth0%5D:1", "fe80::/64"),
        ("unix:/run/router", "unix:/run/router"),
    ],
)
def test_an_address_is_a_host_without_port(peer, address):
    class Context:
        def peer(self):
            return peer

    assert address_of(Context()) == address
