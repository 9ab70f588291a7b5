"""What a server-sent event costs: this router's own connections beside starlette on uvicorn (httptools, uvloop).

    pip install --no-deps --target build/http-stack starlette==1.10.0 uvicorn==0.54.0
    PYTHONPATH=build/http-stack python -m tests.perf.http_stack --streams 256 --events 200

A server process of each kind, by turns, writes an event of a completion to every stream each 20 ms; clients in this
process read. CPU time is user and system time of the server's process between the first event and the last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import uvloop

_EVENT = (
    'data: {"id":"cmpl-0123456789abcdef01234567","object":"text_completion","created":1795922239,"model":"demo",'
    '"choices":[{"index":0,"text":" fox","logprobs":null,"finish_reason":null}]}\n\n'
)
_STEP_S = 0.02
_STACKS = ("own", "starlette")


class Steps:
    """Begins when everybody is there, and then ticks."""

    def __init__(self, num_streams: int, num_events: int) -> None:
        self.num_events = num_events
        self._missing = num_streams
        self._begun = asyncio.Event()

    async def ticks(self) -> AsyncGenerator[None]:
        """Yield so many times, together with all others."""
        self._missing -= 1
        if not self._missing:
            self._begun.set()
        await self._begun.wait()
        start_s = asyncio.get_running_loop().time()
        for tick in range(self.num_events):
            await asyncio.sleep(max(0.0, start_s + tick * _STEP_S - asyncio.get_running_loop().time()))
            yield


async def _serve_own(steps: Steps) -> None:
    from headrace_router.face.http.exchange import Exchange
    from headrace_router.face.http.server import HttpServer

    exchanges: list[Exchange] = []
    done = asyncio.Event()

    async def tick() -> None:  # as a step's entries do: one call after the other, no task for each
        async for _ in steps.ticks():
            for each in exchanges:
                each.send(_EVENT)
        done.set()

    async def app(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchanges.append(exchange)
        if len(exchanges) == num_streams:
            ticking.append(asyncio.create_task(tick()))
        await done.wait()
        exchange.end_stream("data: [DONE]\n\n")

    num_streams, steps._missing = steps._missing, 1
    ticking: list[asyncio.Task[None]] = []
    print((await HttpServer(app, tls=None).start("127.0.0.1:0")).rpartition(":")[2], flush=True)  # noqa: T201
    await asyncio.Event().wait()


async def _serve_starlette(steps: Steps) -> None:
    import uvicorn  # pyright: ignore
    from starlette.applications import Starlette  # pyright: ignore
    from starlette.responses import StreamingResponse  # pyright: ignore
    from starlette.routing import Route  # pyright: ignore

    async def events() -> AsyncGenerator[str]:
        async for _ in steps.ticks():
            yield _EVENT
        yield "data: [DONE]\n\n"

    async def stream(request: Any) -> Any:
        del request
        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/", stream)])
    config = uvicorn.Config(app, port=0, http="httptools", log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)  # noqa: T201
    await serving


async def _read(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data = (data + await reader.read(1 << 16))[-64:]
    writer.close()


def measure(stack: str, num_streams: int, num_events: int) -> float:
    """Return CPU µs of the server for each event."""
    command = [sys.executable, "-m", __spec__.name, "--serve", stack]
    command += ["--streams", str(num_streams), "--events", str(num_events)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None, "a pipe"
        port = int(process.stdout.readline())
        before_s = _cpu_s(process.pid)

        async def main() -> None:
            await asyncio.gather(*(_read(port) for _ in range(num_streams)))

        uvloop.run(main())
        cpu_s = _cpu_s(process.pid) - before_s
        process.kill()
    return 1e6 * cpu_s / (num_streams * num_events)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print the figures of each stack as JSON."""
    parser = argparse.ArgumentParser(description="Measure what a server-sent event costs.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", choices=_STACKS)
    options = parser.parse_args()
    if options.serve:
        serve = {"own": _serve_own, "starlette": _serve_starlette}[options.serve]
        uvloop.run(_run(serve, options.streams, options.events))
    figures: dict[str, list[float]] = {stack: [] for stack in _STACKS}
    for _ in range(options.rounds):
        for stack in _STACKS:
            figures[stack].append(round(measure(stack, options.streams, options.events), 1))
    sys.stdout.write(json.dumps({"cpu_us_per_event": figures, "load": os.getloadavg()[0]}) + "\n")


async def _run(serve: Any, num_streams: int, num_events: int) -> None:
    await serve(Steps(num_streams, num_events))


if __name__ == "__main__":
    main()
