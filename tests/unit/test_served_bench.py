"""The served bench: how it times a stream of OpenAI's kind, and what it makes of both sides' figures."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.perf.served.openai import openai_asking
from tests.perf.served.servers import Load
from tests.perf.served.summary import ratios, table

_LOAD = Load(Path("model"), 2, 3, 1, 1)


def _event(usage) -> bytes:
    line = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
    return f"{len(line):x}\r\n".encode() + line + b"\r\n"


async def _ask(status: str, events: list[bytes]):
    asked = []

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        asked.append(json.loads(await reader.readexactly(length)))
        writer.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + b"".join(events))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        times = await openai_asking("127.0.0.1", server.sockets[0].getsockname()[1], _LOAD)([5, 6])
    return asked[0], times


def test_each_token_of_a_stream_is_timed():
    events = [_event({"completion_tokens": count}) for count in (0, 1, 3, 3)]
    asked, times = asyncio.run(_ask("200 OK", [*events, b"e\r\ndata: [DONE]\n\n\r\n"]))
    assert (asked["prompt"], asked["max_tokens"], asked["ignore_eos"]) == ([5, 6], 3, True)
    assert [count for _, count in times.deltas] == [1, 2]


@pytest.mark.parametrize(
    ("status", "events", "says"),
    [
        ("404 Not Found", [b"no such model"], "404"),
        ("200 OK", [_event({"completion_tokens": 1})], "1 tokens of 3"),
    ],
)
def test_a_stream_that_is_refused_or_cut_short_is_an_error(status, events, says):
    with pytest.raises(RuntimeError, match=says):
        asyncio.run(_ask(status, events))


def _cell(rate, ttft, itl):
    times = {"p50": 1.0}
    return {
        "tokens_per_s": rate,
        "ttft_ms": times | {"p99": ttft},
        "itl_ms": times | {"p99": itl},
        "cpu_s_per_1000_tokens": 5.0,
    }


def test_ratios_are_ours_to_theirs_and_null_without_them():
    cells = {"both": {8: _cell(30.0, 50.0, 20.0)}, "vllm": {8: _cell(20.0, 100.0, 80.0)}}
    assert ratios(cells) == {
        "both_c8_tokens_per_s_vs_vllm": 1.5,
        "both_c8_itl_p99_vs_vllm": 0.25,
        "both_c8_ttft_p99_vs_vllm": 0.5,
    }
    assert set(ratios({"both": cells["both"]}).values()) == {None}
    assert "8, vllm" in table({"cells": cells, "not_measured": {}})
