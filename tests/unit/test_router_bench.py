"""The router bench: what it makes of samples, and that its stub speaks as a server does."""

import asyncio

from headrace_client.bench.http_target import HttpOptions, HttpTarget

from tests.perf.router.http_stub import Connection, Steps
from tests.perf.router.summary import summary, table


def _sample(us, ttft=5.0, itl=20.0, rate=100.0):
    return {
        "us_per_token": us,
        "us_per_request": 64 * us,
        "tokens_per_s": rate,
        "ttft_ms": {"p50": ttft, "p99": 2 * ttft},
        "itl_ms": {"p50": itl, "p99": itl + 1},
    }


def test_keys_are_the_least_of_the_rounds_and_null_without_a_peer():
    samples = {
        "paced_256": {"headrace": [_sample(30.0), _sample(25.0)], "vllm-router": [_sample(24.0)]},
        "alone_1": {"headrace": [_sample(1.0, ttft=3.0)], "direct": [_sample(0.0, ttft=1.0)]},
        "full_256": {"headrace": [_sample(1.0, rate=10.0), _sample(1.0, rate=12.0)]},
    }
    found = summary(samples)
    assert (found["http_us_per_token_256"], found["vllm_router_us_per_token_256"]) == (25.0, 24.0)
    assert (found["grpc_us_per_token_256"], found["sglang_router_us_per_token_256"]) == (None, None)
    assert found["added_ttft_ms_p50"] == 2.0
    assert found["http_max_tokens_per_s"] == 12.0
    assert "paced_256   headrace" in table(samples)


def test_the_stub_streams_a_token_each_step():
    async def ask():
        steps = Steps(0.0)
        stepping = asyncio.create_task(steps.run())
        server = await asyncio.get_running_loop().create_server(lambda: Connection("decode", steps), "127.0.0.1", 0)
        tokens = []
        async with server:
            target = HttpTarget(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", HttpOptions())
            await target.start()
            told = await target.ask("a text", 5, tokens.append)
            await target.close()
        stepping.cancel()
        return tokens, told

    tokens, told = asyncio.run(ask())
    assert tokens == [1] * 5
    assert (told.num_prompt, told.num_output) == (50, 5)
