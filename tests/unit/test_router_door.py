"""The router's door: who is turned away before the message is read, and whose place a full queue gives to whom."""

import asyncio
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.v1 import generation_service_pb2 as pb
from headrace_client import AsyncClient, Client, ConnectionOptions, RetryPolicy, SamplingParams
from headrace_core import rpc
from headrace_core.errors import (
    HeadraceError,
    InvalidRequestError,
    OverloadedError,
    UnauthenticatedError,
    UnavailableError,
)
from headrace_core.testing.api_keys import make_keys
from headrace_core.testing.fake_script import scripted
from headrace_core.testing.fake_worker import FakeWorker
from headrace_router import service
from headrace_router.testing import VOCAB_SIZE, RouterUnderTest, byte_ids, scripted_worker, text_request, wait_until

from tests.unit.raw_http2 import call_without_window, wait_idle_close

GENERATE = "/headrace.v1.GenerationService/Generate"
WAIT_S = 20.0


def run(folder, test, *, workers=None, **settings):
    async def main():
        worker = FakeWorker("both", next_token=scripted(byte_ids("abcdefgh ")), vocab_size=VOCAB_SIZE)
        async with RouterUnderTest(
            folder, workers=[worker] if workers is None else workers, settings=settings
        ) as router:
            await router.wait_states(["ready"] * len(router.workers))
            await test(router)

    asyncio.run(main())


def bearer(token):
    return (("authorization", f"Bearer {token}"),) if token else ()


def silent(router, token=""):
    """Open a call of Generate that never sends its message."""
    return router.channel.stream_stream(GENERATE)(timeout=WAIT_S, metadata=bearer(token))


def asking(router, token=""):
    """Begin a request; return the task that reads it to its end."""

    async def read():
        async for _ in router.stub.Generate(text_request("a"), timeout=WAIT_S, metadata=bearer(token)):
            pass

    return asyncio.create_task(read())


async def failure(call) -> HeadraceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return rpc.raised_from(caught.value)


def num_queued(router):
    return router.service._router.num_queued


async def with_full_queue(router, *, token="", size=2):
    """Fill the queue while no worker takes anything; return the tasks of those in it."""
    router.workers[0].drain()
    await router.wait_states(["draining"])
    waiting = []
    for count in range(size):
        waiting.append(asking(router, token))
        await wait_until(lambda count=count: num_queued(router) == count + 1)
    return waiting


async def end(*tasks):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_without_a_key_no_message_is_read(tmp_path):
    async def test(router):
        error = await failure(silent(router).read())
        assert (type(error), error.reason) == (UnauthenticatedError, "BAD_API_KEY")
        assert router.metric("headrace_refused_requests_total", reason="BAD_API_KEY") == 1
        assert router.metric("headrace_requests_total", outcome="invalid") == 1

    async def main():
        (tmp_path / "keys.toml").write_text(make_keys("alice")[1])
        async with RouterUnderTest(tmp_path, settings={"keys_file": tmp_path / "keys.toml"}) as router:
            await test(router)

    asyncio.run(main())


def test_a_full_queue_refuses_before_a_message_is_read(tmp_path):
    async def test(router):
        waiting = await with_full_queue(router)
        error = await failure(silent(router).read())
        assert (type(error), error.reason, error.retry_after_s > 0) == (OverloadedError, "QUEUE_FULL", True)
        assert router.metric("headrace_refused_requests_total", reason="QUEUE_FULL") == 1
        assert router.metric("headrace_requests_total", outcome="overloaded") == 1
        info = await router.info()
        assert (info.num_queued, info.num_running) == (2, 2)
        assert (await health_pb2_grpc.HealthStub(router.channel).Check(health_pb2.HealthCheckRequest())).status == 1
        await end(*waiting)

    run(tmp_path, test, max_queued_requests=2)


def test_a_draining_router_refuses_before_a_message_is_read(tmp_path):
    async def test(router):
        held = router.workers[0].faults.join_gate
        held.clear()
        running = asking(router)
        await wait_until(lambda: len(router.workers[0].starts) == 1)
        draining = asyncio.create_task(router.service.drain())
        await asyncio.sleep(0)
        assert (await failure(silent(router).read())).reason == "DRAINING"
        held.set()
        await running
        await draining

    run(tmp_path, test)


def test_who_has_most_in_a_full_queue_makes_room_for_another_caller(tmp_path):
    async def test(router):
        waiting = await with_full_queue(router, token="greedy", size=3)
        other = asking(router, "modest")
        error = await failure(waiting[2])
        assert (type(error), error.reason) == (OverloadedError, "QUEUE_FULL")
        assert num_queued(router) == 3
        assert not any(task.done() for task in (*waiting[:2], other))
        assert router.metric("headrace_requests_total", outcome="overloaded") == 1
        assert (await failure(asking(router, "greedy"))).reason == "QUEUE_FULL"
        await end(*waiting, other)

    run(tmp_path, test, max_queued_requests=3)


def test_a_request_that_a_worker_has_is_not_put_out(tmp_path):
    async def test(router):
        router.workers[0].faults.join_gate.clear()
        placed = asking(router, "greedy")
        await wait_until(lambda: len(router.workers[0].starts) == 1)
        waiting = await with_full_queue(router, token="greedy", size=2)
        other = asking(router, "modest")
        assert (await failure(waiting[1])).reason == "QUEUE_FULL"
        router.workers[0].faults.join_gate.set()
        await placed
        await end(*waiting, other)

    run(tmp_path, test, max_queued_requests=2)


def test_calls_that_send_no_message_do_not_keep_a_full_queue_full(tmp_path, monkeypatch):
    limits = service.generate_limits
    monkeypatch.setattr(service, "generate_limits", lambda settings: replace(limits(settings), patience_s=1.0))

    async def test(router):
        calls = []
        for count in range(3):
            calls.append(silent(router))
            await wait_until(lambda count=count: num_queued(router) == count + 1)
        # One is being read; of those in line the oldest makes room, and the newest call has the next turn.
        assert (await router.generate(text_request("a", sampling={"max_tokens": 3})))[0].text == "abc"
        assert (await failure(calls[1].read())).reason == "QUEUE_FULL"
        assert (await failure(calls[0].read())).reason == "MESSAGE_TIMEOUT"
        calls[2].cancel()

    run(tmp_path, test, max_queued_requests=3, max_body_mib=16)


def test_open_requests_are_bounded_and_one_caller_has_half_of_them(tmp_path):
    async def test(router):
        gate = router.workers[0].faults.join_gate
        gate.clear()
        held = [asking(router, "greedy") for _ in range(4)]
        await wait_until(lambda: len(router.workers[0].starts) == 4)
        error = await failure(silent(router, "greedy").read())
        assert (error.reason, "room for 8" in str(error)) == ("QUEUE_FULL", True)
        other = asking(router, "modest")
        await wait_until(lambda: len(router.workers[0].starts) == 5)
        gate.set()
        await asyncio.gather(*held, other)

    run(tmp_path, test, max_open_requests=8)


def test_a_message_that_never_comes_ends_its_request(tmp_path):
    async def test(router):
        assert (await failure(silent(router).read())).reason == "MESSAGE_TIMEOUT"
        assert router.metric("headrace_refused_requests_total", reason="MESSAGE_TIMEOUT") == 1
        await router.wait_empty()

    run(tmp_path, test, message_timeout_s=0.05)


def test_a_request_of_too_many_parts_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    async def test(router):
        def decode(_):
            raise AssertionError("it was decoded")

        messages = b"\x0a\x00" * 100_000
        chat = pb.TextPrompt(text="x" * len(messages)).SerializeToString()[1 : -len(messages)]
        call = router.channel.unary_stream(GENERATE)(b"\x2a" + chat + messages, timeout=WAIT_S)
        monkeypatch.setattr(router.service._router, "open", decode)
        error = await failure(call.read())
        assert (type(error), error.reason, "parts" in str(error)) == (InvalidRequestError, "PROMPT_TOO_LONG", True)
        assert router.metric("headrace_refused_requests_total", reason="PROMPT_TOO_LONG") == 1

    run(tmp_path, test)


def test_clients_and_links_that_were_idle_go_on_as_if_nothing_was(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(rpc, "MAX_IDLE_MS", 100)
    once = ConnectionOptions(retry=RetryPolicy(max_attempts=1))

    async def test(router):
        loop = asyncio.get_running_loop()
        with Client(router.address, once) as blocking:
            async with AsyncClient(router.address, once) as client:
                for _ in range(3):
                    for each in (router.address, *(worker.address for worker in router.workers)):
                        await asyncio.to_thread(wait_idle_close, each)
                    answers = [
                        await client.generate("a", SamplingParams(max_tokens=4)),
                        await loop.run_in_executor(None, blocking.generate, "a", SamplingParams(max_tokens=4)),
                    ]
                    assert [answer.text for answer in answers] == ["abcd"] * 2
        assert [worker.state for worker in (await router.info()).workers] == ["ready"] * 2

    workers = [scripted_worker(role, "abcdefgh ") for role in ("prefill", "decode")]
    with caplog.at_level("INFO"):
        run(tmp_path, test, workers=workers)
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []


def test_a_client_that_lets_nothing_be_sent_keeps_its_request_no_longer_than_its_time_limit(tmp_path):
    async def test(router):
        request = text_request("a", sampling={"max_tokens": 900}).SerializeToString()
        connection = await asyncio.to_thread(call_without_window, router.address, GENERATE, request)
        await wait_until(lambda: len(router.service._router._running) == 1)
        (running,) = router.service._router._running.values()
        messages = router.service._door._rooms[GENERATE].messages
        assert messages.taken == len(request)
        await wait_until(lambda: router.metric("headrace_requests_total", outcome="deadline") == 1)
        async with asyncio.timeout(WAIT_S):
            await router.service.drain()
        assert (messages.taken, running.samples, running.spec.prompt_ids) == (0, [], [])
        assert router.service._router.num_running == 0
        connection.close()

    run(tmp_path, test, request_timeout_s=0.5)


def test_every_refusal_is_counted_by_reason_and_none_twice(tmp_path):
    async def test(router):
        for request in (text_request(""), text_request("a", model="other"), text_request("a", n=0)):
            await router.refused(request)
        for reason in ("EMPTY_PROMPT", "UNKNOWN_MODEL", "BAD_REQUEST"):
            assert router.metric("headrace_refused_requests_total", reason=reason) == 1, reason
        call = router.channel.unary_stream(GENERATE)(b"\xff\xff", timeout=WAIT_S)
        assert (await failure(call.read())).reason == "BAD_REQUEST"
        assert router.metric("headrace_refused_requests_total", reason="BAD_REQUEST") == 2
        assert router.metric("headrace_requests_total", outcome="invalid") == 4

    run(tmp_path, test)


def test_a_request_leaves_the_queue_with_its_first_sample(tmp_path):
    async def test(router):
        held = router.workers[0].faults.join_gate
        held.clear()
        two = asyncio.create_task(router.generate(text_request("a", n=2, sampling={"max_tokens": 3})))
        await wait_until(lambda: len(router.workers[0].starts) == 1)
        await wait_until(lambda: (num_queued(router), router.service._router.num_running) == (0, 1))
        assert not two.done()
        held.set()
        assert [sample.text for sample in await two] == ["abc"] * 2

    workers = [scripted_worker("both", "abcdefgh ", num_pages=1, max_context_tokens=16)]
    run(tmp_path, test, workers=workers)


def test_a_router_that_stops_tells_everybody_why(tmp_path):
    async def main():
        async with RouterUnderTest(tmp_path) as router:
            waiting = asking(router)
            await wait_until(lambda: router.service._router._num_entering == 1)
            arriving = [silent(router) for _ in range(40)]
            await wait_until(lambda: num_queued(router) == 41)
            reads = [asyncio.ensure_future(call.read()) for call in arriving]
            stopping = asyncio.create_task(router.service.stop())
            for call in (waiting, *reads):
                error = await failure(call)
                assert (type(error), error.reason) == (UnavailableError, "DRAINING")
            await stopping
            assert num_queued(router) == 0

    asyncio.run(main())
