"""A decode worker's sessions with routers, over real gRPC: opened, silent, left, drained, and ended with it."""

import asyncio
import contextlib
import dataclasses

import grpc.aio
import pytest
from headrace.v1 import decode_service_pb2, decode_service_pb2_grpc
from headrace_core import beats
from headrace_core.door import MOST_SESSIONS
from headrace_core.errors import (
    UnavailableError,
)
from headrace_core.rpc import channel, raised_from
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import running
from headrace_core.wire import encode_sampling

from tests.unit.test_decode_service import GREEDY, PROMPT, service

MALFORMED = {
    "no opening": [decode_service_pb2.SessionRequest()],
    "no identity": [decode_service_pb2.SessionRequest(open=decode_service_pb2.OpenSession())],
    "opened twice": 2 * [decode_service_pb2.SessionRequest(open=decode_service_pb2.OpenSession(router_id=5))],
}


@pytest.mark.parametrize("messages", MALFORMED.values(), ids=MALFORMED)
@async_test
async def test_a_session_that_makes_no_sense_ends_and_costs_nobody_else(messages):
    async with running(service()) as (address,), MiniRouter(decode=address) as router, channel(address) as other:
        stub = decode_service_pb2_grpc.DecodeServiceStub(other)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in stub.Session(iter(messages), timeout=WAIT_S):
                pass
        assert raised_from(raised.value).reason in ("BAD_REQUEST", "SESSION_CLOSED")
        assert len(await router.generate_colocated("r", PROMPT, params=GREEDY)) == 24


@async_test
async def test_a_router_that_opens_another_session_has_left_the_one_before():
    worker = service()
    async with running(worker) as (address,), MiniRouter(decode=address, router_id=5) as before:
        kept = before.start("r", PROMPT, params=dataclasses.replace(GREEDY, max_tokens=400))
        await kept.wait_tokens(1)
        async with MiniRouter(decode=address, router_id=5) as router:
            await eventually(lambda: before.stream_error is not None, "the earlier one is told")
            assert before.stream_error.reason == "SESSION_CLOSED"
            assert len(await router.generate_colocated("r", PROMPT, params=GREEDY)) == 24
            assert worker.num_sessions == 1


@async_test
async def test_rule_2_a_session_beats_while_there_is_nothing_to_say():
    async with running(service()) as (address,), MiniRouter(decode=address) as router:
        await eventually(lambda: router.num_beats >= 2, "it beats")


@async_test
async def test_rule_2_a_router_that_falls_silent_loses_its_session(monkeypatch):
    monkeypatch.setattr(beats, "BEAT_S", 0.02)
    worker = service()
    async with running(worker) as (address,), MiniRouter(decode=address) as router:
        router.start("r", PROMPT, params=dataclasses.replace(GREEDY, max_tokens=400))
        await eventually(lambda: worker.num_sequences == 1, "it runs")
        router.fall_silent()
        await eventually(lambda: router.stream_error is not None, "the session is over")
        assert "says nothing any more" in str(router.stream_error)
        assert not worker.num_sequences


@async_test
async def test_a_draining_worker_finishes_what_it_has():
    worker = service()
    async with running(worker) as (address,), MiniRouter(decode=address) as router:
        collected = router.start("r", PROMPT, params=GREEDY)
        await collected.wait_joined()
        draining = asyncio.ensure_future(worker.drain())
        await asyncio.wait([draining])
        await collected.wait_end()
        assert len(collected.token_ids) == 24
        refused = router.start("q", PROMPT, params=GREEDY)
        assert (await refused.wait_failure()).reason == "DRAINING"


@async_test
async def test_a_worker_that_stops_tells_its_sessions():
    worker = service(num_pages=256)
    (address,) = [await worker.start()]
    async with MiniRouter(decode=address) as router:
        collected = router.start("r", PROMPT, params=dataclasses.replace(GREEDY, max_tokens=400))
        await collected.wait_tokens(1)
        await worker.stop()
        await eventually(lambda: router.stream_error is not None, "the stream ends")
        assert isinstance(router.stream_error, UnavailableError)
        assert router.stream_error.reason == "DRAINING"


@async_test
async def test_a_dead_engine_fails_the_process():
    worker = service()
    (address,) = [await worker.start()]
    async with MiniRouter(decode=address):
        worker.host.engine.submit(lambda _: 1 / 0)
        await eventually(worker.failed.done, "the worker has failed")
        assert isinstance(worker.failed.exception(), ZeroDivisionError)
        await worker.stop()


@async_test
async def test_a_worker_that_drains_is_not_done_before_its_routers_have_read_the_last_token():
    """What is unread when a session closes is dropped: the sequence would begin again elsewhere for one token."""
    decoder = service()
    async with running(decoder):
        session = decoder.open_session(7)
        start = decode_service_pb2.StartSequence(
            sequence_number=1, attempt=1, request_id="r", timeout_ms=60_000, token_ids=PROMPT,
            num_prompt_tokens=len(PROMPT), sampling=encode_sampling(GREEDY),
        )  # fmt: skip
        decoder.start_sequence(session, start)
        draining = asyncio.ensure_future(decoder.drain())
        await eventually(lambda: not decoder.num_sequences, "the last token is made")
        done, _ = await asyncio.wait([draining], timeout=0)
        assert not done, "the drain is over, and nothing is read"
        tokens: list[int] = []
        while len(tokens) < 24:
            tokens += [token for entry in (await session.next()).entries for token in entry.tokens.token_ids]
        await draining


@async_test
async def test_sessions_that_a_stranger_opens_are_few_and_end_with_it():
    """Each costs a place, memory and a beat a second; a router has one."""
    decoder = service()
    async with running(decoder) as (decode,):
        async with channel(decode) as stranger:
            stub = decode_service_pb2_grpc.DecodeServiceStub(stranger)
            calls = [stub.Session(timeout=WAIT_S) for _ in range(2 * MOST_SESSIONS)]
            reasons = await asyncio.gather(*(_opened(call, number) for number, call in enumerate(calls, 1)))
            assert reasons.count("open") == decoder.num_sessions == MOST_SESSIONS // 2
            assert set(reasons) == {"open", "QUEUE_FULL"}
        await eventually(lambda: not decoder.num_sessions, "they end with their connection")
        async with MiniRouter(decode=decode) as router:
            assert await router.generate_colocated("r", PROMPT, params=GREEDY)


async def _opened(call, router_id):
    """Return "open", or the reason why not."""
    opening = decode_service_pb2.OpenSession(router_id=router_id)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # refused before it has said anything
        await call.write(decode_service_pb2.SessionRequest(open=opening))
    try:
        return "open" if await call.read() is not grpc.aio.EOF else "ended"
    except grpc.aio.AioRpcError as error:
        return raised_from(error).reason
