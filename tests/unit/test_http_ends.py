"""HTTP's answers when something ends: a client that leaves or does not read, a drain, an error in the middle."""

import asyncio
import json

import pytest
from headrace_core.errors import UnavailableError
from headrace_router.face.http import connection
from headrace_router.testing import (
    scripted_worker,
    wait_until,
)

from tests.unit.http_parts import Http, once, run_http
from tests.unit.test_http_openai import CHAT, COMPLETIONS, HI, pair


def test_an_error_after_the_first_token_is_an_event(tmp_path):
    decode = scripted_worker("decode", step_s=None)

    async def test(router, address):
        async with Http(address) as http:
            http.ask("POST", CHAT, {"messages": HI, "max_tokens": 9, "stream": True})
            assert (await http.head())[0] == 200
            assert b'"content":"H"' in await http.chunk()
            router.service._router.fail_all(UnavailableError("DRAINING", "the router stops"))
            last = await http.chunk()
            assert await http.chunk() == b""
        event, data = last.decode().strip().split("\n")
        assert event == "event: error"
        assert json.loads(data.removeprefix("data: "))["error"]["code"] == "DRAINING"

    run_http(tmp_path, [scripted_worker("prefill"), decode], test)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(tmp_path, stream):
    decode = scripted_worker("decode", step_s=None)

    async def test(router, address):
        async with Http(address) as http:
            http.ask("POST", CHAT, {"messages": HI, "max_tokens": 9, "stream": stream})
            await wait_until(lambda: not decode.is_empty)
        await router.wait_empty()
        assert router.metric("headrace_requests_total", outcome="cancelled") == 1

    run_http(tmp_path, [scripted_worker("prefill"), decode], test)


def test_a_request_that_was_answered_is_no_cancelled_one(tmp_path):
    workers = pair()

    async def test(router, address):
        for stream in (True, False):
            await once(address, "POST", CHAT, {"messages": HI, "max_tokens": 5, "stream": stream})
        await router.wait_empty()
        assert router.metric("headrace_requests_total", outcome="ok") == 2
        assert [*workers[0].cancels, *workers[1].cancels] == []

    run_http(tmp_path, workers, test)


def test_a_stream_that_nobody_reads_is_bounded_and_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "STALL_TIMEOUT_S", 0.3)
    ids = {"return_token_ids": True, "stream": True, "max_tokens": 60_000, "prompt": "Hi", "n": 4}

    async def test(router, address):
        async with Http(address) as idle, Http(address) as other:
            idle.writer.transport.pause_reading()
            idle.ask("POST", COMPLETIONS, ids)
            other.ask("POST", COMPLETIONS, {"prompt": "Hi", "max_tokens": 40})
            assert (await other.answer()).status == 200
            await wait_until(lambda: router.metric("headrace_requests_total", outcome="overloaded") == 1)
            (most,) = [
                each._transport.get_write_buffer_size()
                for each in router.service._http._connections._open
                if each._current is not None or each._is_closing
            ] or [0]
            assert most < 2 << 20
            idle.writer.transport.resume_reading()
            assert b"SLOW_READER" in await idle.closed()

    worker = scripted_worker("both", step_s=0.001, tokens_per_step=16, max_context_tokens=1 << 18, num_pages=1 << 14)
    run_http(tmp_path, [worker], test)


def test_a_drain_ends_streams_well_and_refuses_what_is_new(tmp_path):
    decode = scripted_worker("decode", step_s=None)

    async def test(router, address):
        async with Http(address) as running, Http(address) as late, Http(address) as idle:
            idle.ask("GET", "/health")
            await idle.answer()
            running.ask("POST", COMPLETIONS, {"prompt": "Hi", "max_tokens": 3, "stream": True})
            await running.head()
            late.ask("GET", "/ready")
            assert (await late.answer()).status == 200
            draining = asyncio.create_task(router.service.drain())
            assert await idle.closed() == b""
            async with Http(address) as new:
                new.ask("GET", "/ready")
                answer = await new.answer()
                assert (answer.status, answer.headers["connection"]) == (503, "close")
            async with Http(address) as new:
                new.ask("POST", COMPLETIONS, {"prompt": "Hi"})
                assert (await new.answer()).error["code"] == "DRAINING"
            while not draining.done():
                decode.step()
                await asyncio.sleep(0.005)
            rest = await running.closed()
            assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    run_http(tmp_path, [scripted_worker("prefill"), decode], test)
