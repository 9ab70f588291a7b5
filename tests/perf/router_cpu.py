"""The router's CPU time per token: the real router process between a fake worker process and this one.

    python tests/perf/router_cpu.py --streams 32 --tokens 500
    python tests/perf/router_cpu.py --streams 256 --tokens 64 --http
    python tests/perf/router_cpu.py --requests 2000

32 clients' streams at 50 steps a second (1600 tokens/s) are paced by the fake worker, so that what is measured is the
cost of a token and not of saturation. CPU time is user and system time of the router process, all threads, from
/proc/<pid>/stat, between the first and the last token.

With `--http` clients ask OpenAI's endpoint, each over a connection of its own, and read server-sent events.

With `--requests` it is the time per request: of so many, each of a few tokens, through a fake prefill and a fake decode
worker, 16 at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub
from headrace_core import rpc
from headrace_router.testing import text_request, write_tokenizer

_PROMPT = "In the beginning there was a small river and a mill. "
_START_TIMEOUT_S = 30.0

Ask = Callable[[int], Awaitable[tuple[int, int]]]
"""Reads one stream of so many tokens; returns its tokens and messages."""


def measure_router_cpu(
    *, num_streams: int = 32, num_tokens: int = 500, step_ms: float = 20.0, http: bool = False
) -> dict[str, Any]:
    """Return `cpu_us_per_token`, `streams`, `tokens`, and how busy the router was meanwhile."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        worker = stack.enter_context(_worker(step_ms))
        router, addresses = stack.enter_context(_router(root, worker))
        return asyncio.run(_measure(router.pid, addresses, num_streams, num_tokens, http=http))


def measure_request_cpu(
    *, num_requests: int = 2000, num_tokens: int = 4, num_at_once: int = 16, http: bool = False
) -> dict[str, Any]:
    """Return `cpu_us_per_request`, of requests that are prefilled and decoded by two fake workers."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_worker(1.0, role)) for role in ("prefill", "decode")]
        router, addresses = stack.enter_context(_router(Path(folder), ",".join(workers)))
        measuring = _measure_requests(router.pid, addresses, num_requests, num_tokens, num_at_once, http=http)
        return asyncio.run(measuring)


@contextlib.asynccontextmanager
async def _clients(addresses: dict[str, str], *, http: bool) -> AsyncGenerator[Callable[[], Ask]]:
    """Yield what makes a client, which reads one stream of so many tokens when called."""
    if http:
        yield lambda: HttpClient(addresses["http_address"])
        return
    async with rpc.channel(addresses["address"]) as channel:
        stub: Any = GenerationServiceStub(channel)
        yield lambda: partial(_generate, stub)


async def _measure_requests(
    pid: int, addresses: dict[str, str], num_requests: int, num_tokens: int, num_at_once: int, *, http: bool
) -> dict[str, Any]:
    async with _clients(addresses, http=http) as client:
        clients = [client() for _ in range(num_at_once)]

        async def generate(ask: Ask, count: int) -> None:
            for _ in range(count):
                await ask(num_tokens)

        await asyncio.gather(*(generate(ask, 2) for ask in clients))
        first_cpu_s, each = _cpu_s(pid), num_requests // num_at_once
        await asyncio.gather(*(generate(ask, each) for ask in clients))
        cpu_s = _cpu_s(pid) - first_cpu_s
    return {
        "cpu_us_per_request": round(1e6 * cpu_s / (each * num_at_once), 1),
        "requests": each * num_at_once,
        "tokens_per_request": num_tokens,
    }


async def _measure(
    pid: int, addresses: dict[str, str], num_streams: int, num_tokens: int, *, http: bool
) -> dict[str, Any]:
    async with _clients(addresses, http=http) as client:
        await client()(8)
        streams = [asyncio.create_task(client()(num_tokens)) for _ in range(num_streams)]
        first_cpu_s, first_s = _cpu_s(pid), time.monotonic()
        counts = await asyncio.gather(*streams)
        cpu_s, wall_s = _cpu_s(pid) - first_cpu_s, time.monotonic() - first_s
    tokens = sum(count for count, _ in counts)
    messages = sum(count for _, count in counts)
    return {
        "cpu_us_per_token": round(1e6 * cpu_s / tokens, 1),
        "streams": num_streams,
        "tokens": tokens,
        "messages": messages,
        "tokens_per_s": round(tokens / wall_s, 1),
        "router_cpu_share": round(cpu_s / wall_s, 3),
    }


async def _generate(stub: Any, num_tokens: int) -> tuple[int, int]:
    """Read one stream; return its tokens and messages."""
    tokens = messages = 0
    request = text_request(_PROMPT, sampling={"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True})
    async for response in stub.Generate(request, timeout=600):
        tokens += len(response.token_ids)
        messages += 1
    return tokens, messages


class HttpClient:
    """One connection to OpenAI's endpoint."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __call__(self, num_tokens: int) -> tuple[int, int]:
        """Read one stream; return its tokens and events with text."""
        if self._streams is None:
            host, _, port = self._address.rpartition(":")
            self._streams = await asyncio.open_connection(host, int(port))
        reader, writer = self._streams
        fields = {"prompt": _PROMPT, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps({**fields, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        writer.write(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        data = b""
        while not data.endswith(b"\r\n0\r\n\r\n"):
            data += await reader.read(1 << 16)
        tokens = int(data.rpartition(b'"completion_tokens":')[2].partition(b",")[0])
        return tokens, data.count(b'"text":')


def _cpu_s(pid: int) -> float:
    """Return user and system time of a process, all its threads, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _worker(step_ms: float, role: str = "both") -> Generator[str]:
    command = [sys.executable, "-m", "headrace_core.testing.fake_worker", "--role", role, "--vocab-size", "258"]
    with _process([*command, "--step-ms", str(step_ms)]) as process:
        assert process.stdout is not None, "stdout is a pipe"
        yield process.stdout.readline().strip()


@contextlib.contextmanager
def _router(root: Path, worker: str) -> Generator[tuple[subprocess.Popen[str], dict[str, str]]]:
    ready = root / "ready.json"
    command = [sys.executable, "-m", "headrace_router", "--model", str(write_tokenizer(root / "tiny"))]
    options = ["--workers", worker, "--listen", "127.0.0.1:0", "--ready-file", str(ready), "--log-level", "WARNING"]
    options += ["--http-listen", "127.0.0.1:0"]
    with _process([*command, *options]) as process:
        limit_s = time.monotonic() + _START_TIMEOUT_S
        while not ready.exists():
            assert process.poll() is None, "the router ended"
            assert time.monotonic() < limit_s, "the router did not start in time"
            time.sleep(0.02)
        yield process, json.loads(ready.read_text())


@contextlib.contextmanager
def _process(command: list[str]) -> Generator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=20)
        if process.stdout is not None:
            process.stdout.close()


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description="Measure the router's CPU time per token.")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=500, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--requests", type=int, default=0, help="measure CPU time per request instead, of so many")
    parser.add_argument("--http", action="store_true", help="over HTTP, not gRPC")
    options = parser.parse_args()
    if options.requests:
        figures = measure_request_cpu(num_requests=options.requests, http=options.http)
    else:
        figures = measure_router_cpu(
            num_streams=options.streams, num_tokens=options.tokens, step_ms=options.step_ms, http=options.http
        )
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
