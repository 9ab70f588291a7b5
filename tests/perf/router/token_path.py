"""What a token costs in the router's own Python: from a step's message to bytes for a socket, without either.

    python -m tests.perf.router.token_path --streams 256 --steps 200
    python -m tests.perf.router.token_path --profile

In one process, with nothing but the code between a message as a decode worker sends it and what a connection would
write (`fleet/session`, `requests/`, `face/openai/generate`). The least of the steps, which other work on the machine
changes least; `--profile` prints where the time goes.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from headrace.v1 import decode_service_pb2
from headrace_core.request import SamplingParams
from headrace_core.shares import Caller
from headrace_core.testing.fake_worker import FakeWorker
from headrace_core.wire import decode_layout, encode_sampling
from headrace_router.face.http.exchange import Exchange
from headrace_router.face.openai.about import About
from headrace_router.face.openai.events import Events
from headrace_router.face.openai.generate import _stream
from headrace_router.face.openai.request import Wanted
from headrace_router.face.openai.schema import StreamOptions
from headrace_router.fleet.session import StepSession
from headrace_router.metrics import Objectives, RouterMetrics
from headrace_router.requests.admission import RequestSpec
from headrace_router.requests.encoded_prompt import EncodedPrompt
from headrace_router.requests.running import RunningRequest
from headrace_router.requests.waiting import WaitingRoom
from headrace_router.testing import write_tokenizer
from headrace_router.text.tokenizer import Tokenizer

_PROMPT = list(range(40, 90))
_TEXT_IDS = range(97, 123)


class _Wire:
    """Counts what would be written."""

    peer = "ipv4:127.0.0.1:1"
    uris: tuple[bytes, ...] = ()
    is_blocked = False
    num_bytes = 0

    def read_on(self) -> None:
        pass

    def write(self, data: bytes) -> None:
        self.num_bytes += len(data)


class _Flow:
    """Runs a sample at a session that is fed by hand."""

    def __init__(self, session: StepSession, worker: Any) -> None:
        self._session = session
        self._worker = worker
        self._num_started = 0

    async def run(self, sample: Any, trace: Any, *, on_placed: Any) -> None:
        on_placed()
        self._num_started += 1
        sample.number = self._num_started
        sample.begin_attempt(_Progress(), prefill_address="x:1", decode=self._worker, now_s=time.monotonic())
        message = decode_service_pb2.StartSequence(sequence_number=sample.number, attempt=sample.attempt)
        self._session.start(sample, message)
        await sample.attempt_over


class _Progress:
    def on_prefilled(self, num_computed: int) -> None:
        pass

    def on_stepped(self, num_computed: int) -> None:
        pass

    def on_joined(self, transfer: Any) -> None:
        pass


async def measure(num_streams: int, num_steps: int, profile: cProfile.Profile | None) -> float:
    """Return the least µs a token, over steps."""
    info = FakeWorker("decode", vocab_size=258, max_context_tokens=1 << 16, num_pages=1 << 16).info
    layout = decode_layout(info.layout)
    session = StepSession(1, info, layout)
    worker: Any = type("_Worker", (), {"address": "y:1", "layout": layout})()
    metrics = RouterMetrics.create(Objectives())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer(write_tokenizer(Path(folder)))
    flow: Any = _Flow(session, worker)
    room, caller = WaitingRoom(num_streams), Caller("a", "a")
    params = SamplingParams(max_tokens=1 << 20, temperature=0.0, ignore_eos=True, seed=1)
    wires: list[_Wire] = []
    tasks: list[asyncio.Task[None]] = []
    encoded = EncodedPrompt(_PROMPT)
    for number in range(num_streams):
        now_s = time.monotonic()
        spec = RequestSpec(
            str(number), str(number), _PROMPT, encoded, params, encode_sampling(params), 1, include_timings=False,
            is_continuation=True, silent_ids=frozenset(), special_stops={}, arrival_s=now_s, tokenized_s=now_s,
            deadline_s=now_s + 600,
        )  # fmt: skip
        seat = room.take(caller, evict=lambda _: True)
        running = RunningRequest(spec, flow, tokenizer, metrics, seat, on_failed=lambda _: None)
        wanted = Wanted("cmpl", False, True, StreamOptions(include_usage=True), False, False, False)
        about = About(wanted, f"cmpl-{number:024}", 1, "tiny", [_PROMPT], [""], 1, tokenizer.token_bytes, bool)
        wires.append(_Wire())
        exchange = Exchange(wires[-1], "POST", "/v1/completions", [], is_http_1_0=False)
        tasks.append(asyncio.create_task(_stream(exchange, running, Events(about))))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    position = len(_PROMPT)
    prefilled = decode_service_pb2.Prefilled(token_id=97, tokens_sha256=encoded.sha256([]))
    _feed(session, num_streams, position, prefilled=prefilled)
    _feed(session, num_streams, position + 1, joined=decode_service_pb2.Joined())
    least_s = float("inf")
    for step in range(num_steps):
        token = decode_service_pb2.Tokens(token_ids=[_TEXT_IDS[step % len(_TEXT_IDS)]])
        data = _message(num_streams, position + 1 + step, tokens=token).SerializeToString()
        if profile is not None:
            profile.enable()
        begin_s = time.perf_counter()
        session._fan_out(decode_service_pb2.SessionResponse.FromString(data))
        least_s = min(least_s, time.perf_counter() - begin_s)
        if profile is not None:
            profile.disable()
    assert all(wire.num_bytes > 100 * num_steps for wire in wires)
    for task in (*tasks, *(each for each in asyncio.all_tasks() if each is not asyncio.current_task())):
        task.cancel()
    return 1e6 * least_s / num_streams


def _message(num_streams: int, position: int, **event: Any) -> decode_service_pb2.SessionResponse:
    entries = [
        decode_service_pb2.StepEntry(sequence_number=number + 1, attempt=1, position=position, **event)
        for number in range(num_streams)
    ]
    return decode_service_pb2.SessionResponse(entries=entries, step_us=100)


def _feed(session: StepSession, num_streams: int, position: int, **event: Any) -> None:
    session._fan_out(_message(num_streams, position, **event))


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description="Measure what a token costs in the router's own Python.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    profile = cProfile.Profile() if options.profile else None
    least_us = asyncio.run(measure(options.streams, options.steps, profile))
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(28)
    sys.stdout.write(f"{least_us:.2f} µs a token\n")


if __name__ == "__main__":
    main()
