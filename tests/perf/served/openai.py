"""A client of a server with OpenAI's completions: what it takes to time each token, and no more."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

from tests.perf.closed_loop import Ask, RequestTimes

if TYPE_CHECKING:
    from tests.perf.served.servers import Load

_DATA = b"data: "
_DONE = b"[DONE]"


def openai_asking(host: str, port: int, load: Load) -> Ask:
    """Return what asks for `load.num_out` greedy tokens, streamed, on a connection of its own.

    Raises when called:
        RuntimeError: the server refuses, or ends the stream early.
    """

    async def ask(prompt: list[int]) -> RequestTimes:
        wanted = {
            "model": str(load.checkpoint), "prompt": prompt, "max_tokens": load.num_out, "temperature": 0.0,
            "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }  # fmt: skip
        sent_s = time.monotonic()
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(_request(host, json.dumps(wanted).encode()))
            return await _times(reader, sent_s, load.num_out)
        finally:
            writer.close()

    return ask


def _request(host: str, body: bytes) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _times(reader: asyncio.StreamReader, sent_s: float, num_out: int) -> RequestTimes:
    """Read the stream; a line of another kind (a header, a chunk's size) is passed over."""
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"the server answered {status!r}: {(await reader.read())[-500:]!r}")
    deltas: list[tuple[float, int]] = []
    num_tokens = 0
    async for line in reader:
        if not line.startswith(_DATA) or _DONE in line:
            continue
        usage = json.loads(line.removeprefix(_DATA)).get("usage")
        if usage and usage["completion_tokens"] > num_tokens:
            deltas.append((time.monotonic() - sent_s, usage["completion_tokens"] - num_tokens))
            num_tokens = usage["completion_tokens"]
    if num_tokens != num_out:
        raise RuntimeError(f"the server streamed {num_tokens} tokens of {num_out}")
    return RequestTimes(deltas)
