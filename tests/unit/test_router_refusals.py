"""Requests that the router refuses, and in which words."""

import asyncio

import grpc
import pytest
from headrace.v1 import generation_service_pb2 as pb
from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub
from headrace_core.grpc_options import MAX_MESSAGE_BYTES
from headrace_core.testing.async_test import WAIT_S
from headrace_router.testing import (
    VOCAB_SIZE,
    chat_request,
    run_router,
    scripted_worker,
    text_request,
    tokens_request,
    wait_until,
)

BAD_REQUESTS = {
    "no input": (pb.GenerateRequest(), "EMPTY_PROMPT", "one of"),
    "empty text": (text_request(""), "EMPTY_PROMPT", ""),
    "no tokens": (tokens_request(), "EMPTY_PROMPT", ""),
    "no messages": (chat_request(), "EMPTY_PROMPT", ""),
    "prompt past the context": (tokens_request(*[1] * 64), "PROMPT_TOO_LONG", "64"),
    "prompt past the bytes": (text_request("x" * 5000), "PROMPT_TOO_LONG", "5000 bytes; this router takes 4096"),
    "token outside the vocabulary": (tokens_request(1, VOCAB_SIZE), "BAD_TOKEN", str(VOCAB_SIZE)),
    "stop token outside": (text_request("a", sampling={"stop_token_ids": [9999]}), "BAD_TOKEN", "stop_token_ids"),
    "other model": (text_request("a", model="gpt"), "UNKNOWN_MODEL", "'tiny' is"),
    "n of 0": (text_request("a", n=0), "BAD_REQUEST", "1 to 16"),
    "n of 17": (text_request("a", n=17), "BAD_REQUEST", "1 to 16"),
    "max_tokens of 0": (text_request("a", sampling={"max_tokens": 0}), "BAD_SAMPLING", "max_tokens"),
    "temperature": (text_request("a", sampling={"temperature": -1}), "BAD_SAMPLING", "temperature"),
    "empty stop string": (text_request("a", sampling={"stop_strings": [""]}), "BAD_SAMPLING", "stop_strings"),
    "request id": (text_request("a", request_id="no spaces"), "BAD_REQUEST", "request_id"),
    "role": (chat_request(("robot", "hi")), "BAD_REQUEST", "assistant"),
    "template says no": (chat_request(("user", "a"), ("system", "b")), "BAD_REQUEST", "system comes first"),
}


def test_bad_requests_are_refused_with_what_is_wrong(tmp_path):
    async def test(router):
        for name, (request, reason, words) in BAD_REQUESTS.items():
            error = await router.refused(request)
            assert error.reason == reason, name
            assert words in str(error), name
        assert router.workers[0].starts == []
        assert router.metric("headrace_requests_total", outcome="invalid") == len(BAD_REQUESTS)

    run_router(tmp_path, [scripted_worker("both", max_context_tokens=64)], test, max_prompt_bytes=4096)


def test_a_message_over_grpcs_limit_is_refused(tmp_path):
    async def test(router):
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(router.address, options=options) as channel:
            request = text_request("x" * (MAX_MESSAGE_BYTES + 1))
            call = GenerationServiceStub(channel).Generate(request, timeout=WAIT_S)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    run_router(tmp_path, [scripted_worker("both")], test)


def test_a_full_queue_refuses(tmp_path):
    async def test(router):
        both = router.workers[0]
        both.drain()
        await router.wait_states(["draining"])
        waiting = [asyncio.create_task(router.generate(text_request("a"))) for _ in range(2)]
        await wait_until(lambda: router.service._router.num_queued == 2)
        assert (await router.refused(text_request("a"))).reason == "QUEUE_FULL"
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)

    run_router(tmp_path, [scripted_worker("both")], test, max_queued_requests=2)


@pytest.mark.parametrize("role", ["prefill", "decode", None])
def test_without_workers_the_error_says_what_is_missing(tmp_path, role):
    async def test(router):
        error = await router.refused(text_request("a"))
        assert error.reason == "NO_WORKERS"
        missing = {"prefill": "no decode worker", "decode": "no prefill worker", None: "no worker"}[role]
        assert missing in str(error)

    run_router(tmp_path, [scripted_worker(role)] if role else [], test, no_workers_timeout_s=0.3)


def test_a_prompt_larger_than_every_pool_is_refused(tmp_path):
    async def test(router):
        error = await router.refused(text_request("x" * 100))
        assert (error.reason, "largest pool holds 64" in str(error)) == ("NO_FREE_PAGES", True)

    run_router(tmp_path, [scripted_worker("both", num_pages=4)], test)
