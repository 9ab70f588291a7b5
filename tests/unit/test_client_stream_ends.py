"""Streams that end early, by whatever way: their request is cancelled, and nothing is tried again."""

import asyncio
import gc
import threading

import pytest
from headrace_client import (
    AsyncClient,
    Client,
    ConnectionOptions,
    InvalidRequestError,
    RetryPolicy,
)
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.fake_router import FakeRouter, Hold, answer

from tests.unit.test_client_stream import AT_ONCE, FULL, NOBODY


def test_closing_the_client_ends_its_streams_and_tries_nothing_again():
    with FakeRouter([next(answer("a", "b")), Hold.UNTIL_CANCELLED]) as router:
        client = Client(router.address, AT_ONCE)
        stream = client.stream("Tell")
        assert next(stream).text == "a"
        client.close()
        with pytest.raises(InvalidRequestError, match="was closed") as caught:
            next(stream)
    assert (len(router.requests), caught.value.reason) == (1, "CLIENT_CLOSED")


def test_closing_an_asyncio_client_ends_its_streams_with_an_error_and_cancels_no_task():
    async def run(router: FakeRouter) -> None:
        client = AsyncClient(router.address, AT_ONCE)
        stream = client.stream("Tell")
        assert (await anext(stream)).text == "a"
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(InvalidRequestError, match="was closed"):
            await reading

    with FakeRouter([next(answer("a", "b")), Hold.UNTIL_CANCELLED]) as router:
        asyncio.run(run(router))
    assert len(router.requests) == 1


def test_a_closed_client_says_so():
    client = Client(NOBODY)
    client.close()
    for call in (lambda: client.generate("Tell"), client.server_info):
        with pytest.raises(InvalidRequestError) as caught:
            call()
        assert caught.value.reason == "CLIENT_CLOSED"

    async def run() -> None:
        client = AsyncClient(NOBODY)
        await client.close()
        for call in (lambda: client.generate("Tell"), client.server_info):
            with pytest.raises(InvalidRequestError) as caught:
                await call()
            assert caught.value.reason == "CLIENT_CLOSED"

    asyncio.run(run())


@pytest.mark.parametrize("way", ["close", "cancel", "with", "drop", "other thread"])
def test_ending_a_stream_early_cancels_the_request(way):
    with FakeRouter([next(answer("a", "b")), Hold.UNTIL_CANCELLED]) as router, Client(router.address) as client:
        stream = client.stream("Tell")
        assert next(stream).text == "a"
        match way:
            case "close":
                stream.close()
                assert list(stream) == []
            case "cancel":
                stream.cancel()
                assert list(stream) == []
            case "with":
                with stream:
                    pass
            case "drop":
                del stream
                gc.collect()
            case _:
                helper = threading.Timer(0.05, stream.cancel)
                helper.start()
                assert list(stream) == []
                helper.join()
        assert router.cancelled.wait(WAIT_S)


@pytest.mark.parametrize("way", ["aclose", "cancel", "with", "drop", "task"])
def test_ending_an_async_stream_early_cancels_the_request(way):
    async def run(router: FakeRouter) -> None:
        async with AsyncClient(router.address) as client:
            stream = client.stream("Tell")
            assert (await anext(stream)).text == "a"
            match way:
                case "aclose":
                    await stream.aclose()
                    assert [delta async for delta in stream] == []
                case "cancel":
                    asyncio.get_running_loop().call_later(0.05, stream.cancel)
                    assert [delta async for delta in stream] == []
                case "with":
                    async with stream:
                        pass
                case "drop":
                    del stream
                    gc.collect()
                case _:
                    task = asyncio.ensure_future(anext(stream))
                    await asyncio.sleep(0)
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
            assert await asyncio.to_thread(router.cancelled.wait, WAIT_S)

    with FakeRouter([next(answer("a", "b")), Hold.UNTIL_CANCELLED]) as router:
        asyncio.run(run(router))


def test_a_cancelled_pause_between_tries_ends_the_stream():
    patient = ConnectionOptions(retry=RetryPolicy(2, first_pause_s=1e6, longest_pause_s=1e6, longest_wait_s=1e7))
    with FakeRouter([FULL]) as router, Client(router.address, patient) as client:
        stream = client.stream("Tell")
        helper = threading.Timer(0.05, stream.cancel)
        helper.start()
        assert list(stream) == []
        helper.join()
    assert len(router.requests) <= 1


def test_pieces_arrive_before_the_answer_is_complete():
    with FakeRouter([next(answer("a", "b")), Hold.UNTIL_CANCELLED]) as router, Client(router.address) as client:
        with client.stream("Tell") as stream:
            delta = next(stream)
        assert (delta.text, delta.token_ids, delta.finish_reason, delta.request_id) == ("a", (100,), None, "fake-1")
