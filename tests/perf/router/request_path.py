"""What a request costs in the router's own Python: from the bytes of its HTTP to those of its answer, without sockets.

    python -m tests.perf.router.request_path --requests 400
    python -m tests.perf.router.request_path --profile

In one process: the connection, the door, the fields, the tokenizer, the queue, the placement, the session's messages,
the text and the events of a streamed answer. In place of the workers a function answers each start with the messages of
a hand-off and so many tokens. The least of the rounds, CPU time, which other work on the machine changes least.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
from headrace.v1 import decode_service_pb2 as pb
from headrace_core.config import RouterSettings
from headrace_core.request import hash_tokens
from headrace_core.testing.fake_worker import FakeWorker
from headrace_core.wire import decode_layout
from headrace_router.face.http.connection import Connection
from headrace_router.face.http.connections import Connections
from headrace_router.face.openai.app import OpenAiApp
from headrace_router.fleet.link import Link, LinkState
from headrace_router.fleet.worker import Worker
from headrace_router.service import RouterService
from headrace_router.testing import VOCAB_SIZE, write_tokenizer

_PROMPT = "In the beginning there was a small river and a mill. "
_ROUND = 16
"""Requests at once, as clients of `short_16` are."""


class _Transport:
    """A client's socket: counts what is written."""

    def __init__(self) -> None:
        self.num_bytes = self.num_writes = 0
        self.on_last = asyncio.Event()

    def write(self, data: bytes) -> None:
        self.num_bytes += len(data)
        self.num_writes += 1
        if data.endswith(b"0\r\n\r\n"):
            self.on_last.set()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peername":
            return ("127.0.0.1", 5000)
        return _NoSocket() if name == "socket" else default

    def is_closing(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


class _NoSocket:
    family = 2

    def setsockopt(self, *_: Any) -> None:
        pass


class _Decoder:
    """Answers a start: a first token, that it joined, and the others one by one, each in a turn of the loop."""

    def __init__(self, worker: Worker, num_tokens: int) -> None:
        self._worker = worker
        self._num_tokens = num_tokens
        self._due: list[tuple[int, int, int, int]] = []
        """Number, attempt, position, tokens left."""

    def say(self, data: bytes) -> None:
        request = pb.SessionRequest.FromString(data)
        if request.WhichOneof("command") != "start":
            return
        start, loop = request.start, asyncio.get_running_loop()
        position = len(start.token_ids)
        prefilled = pb.Prefilled(token_id=97, tokens_sha256=hash_tokens(start.token_ids))
        about = {"sequence_number": start.sequence_number, "attempt": start.attempt}
        messages = [
            [pb.StepEntry(**about, position=position, prefilled=prefilled)],
            [pb.StepEntry(**about, position=position + 1, joined=pb.Joined())],
        ]
        for number in range(1, self._num_tokens):
            is_last = number == self._num_tokens - 1
            tokens = pb.Tokens(token_ids=[97 + number % 26], finish_reason=2 if is_last else 0)
            messages.append([pb.StepEntry(**about, position=position + number, tokens=tokens)])
        data = [pb.SessionResponse(entries=entries, step_us=100).SerializeToString() for entries in messages]

        def tell() -> None:
            self._worker.session._on_message(data.pop(0))
            if data:
                loop.call_soon(tell)

        loop.call_soon(tell)


class _Beat:
    def said(self) -> None:
        pass


async def measure(num_requests: int, num_tokens: int, profile: cProfile.Profile | None) -> tuple[float, float]:
    """Return the least CPU µs a request, over rounds, and writes a request."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_tokenizer(Path(folder) / "tiny")
        service = RouterService(
            RouterSettings(model=model, listen="127.0.0.1:0", http_listen="", workers="127.0.0.1:1")
        )
        await service.start()
        router = service._router
        assert router is not None
        assert service._following is not None
        service._following.cancel()
        await asyncio.sleep(0.05)
        for role in ("prefill", "decode"):
            fake = FakeWorker(role, vocab_size=VOCAB_SIZE, max_context_tokens=1 << 16, num_pages=1 << 16,
                              max_step_tokens=1 << 14, max_step_sequences=288)  # fmt: skip
            link = Link(f"{role}:1", router.fleet)
            link.info = fake.info
            worker = Worker(link.address, fake.info, decode_layout(fake.info.layout), 1, link.breaker)
            worker.on_report(fake.load())
            link.worker, link.state = worker, LinkState.READY
            if role == "decode":
                worker.session._call, worker.session._beat = _Decoder(worker, num_tokens), _Beat()
            router.fleet._links[link.address] = link, asyncio.ensure_future(asyncio.Event().wait())
        router.fleet.on_state()
        app = OpenAiApp(router, service._door, service._caller_of, service.registry)
        connections = Connections(1000)
        ends = []
        for _ in range(_ROUND):
            connection, transport = Connection(app, connections), _Transport()
            connection.connection_made(transport)
            ends.append((connection, transport))
        fields = {
            "model": "tiny", "prompt": _PROMPT, "max_tokens": num_tokens, "stream": True, "temperature": 0.0,
            "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        body = json.dumps(fields).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:8000\r\nconnection: keep-alive\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\naccept: text/event-stream\r\n\r\n"
        )
        request = head.encode() + body
        least_s = float("inf")
        for _ in range(num_requests // _ROUND):
            if profile is not None:
                profile.enable()
            begin_s = time.thread_time()
            for connection, transport in ends:
                transport.on_last.clear()
                connection.data_received(request)
            for _, transport in ends:
                await transport.on_last.wait()
            least_s = min(least_s, time.thread_time() - begin_s)
            if profile is not None:
                profile.disable()
            await asyncio.sleep(0.001)
        num_writes = ends[0][1].num_writes / (num_requests // _ROUND)
        for _, task in router.fleet._links.values():
            task.cancel()
        router.fleet._links.clear()
        await service.stop()
    return 1e6 * least_s / _ROUND, num_writes


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description="Measure what a request costs in the router's own Python.")
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    profile = cProfile.Profile() if options.profile else None
    least_us, num_writes = uvloop.run(measure(options.requests, options.tokens, profile))
    if profile is not None:
        stats = pstats.Stats(profile)
        stats.sort_stats("tottime").print_stats(45)
        stats.sort_stats("cumtime").print_stats(60)
    sys.stdout.write(f"{least_us:.0f} µs a request of {options.tokens} tokens, {num_writes:.1f} writes\n")


if __name__ == "__main__":
    main()
