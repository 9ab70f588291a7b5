"""Clients that mean harm, in a process of their own: `python -m tests.stress.hostile ADDRESS --report FILE`.

Its API key is in HEADRACE_API_KEY.

Each kind is one function: one attempt, which returns what became of it: "served", or the reason of the refusal. Kinds
run in bursts that overlap. A refusal that carries none of our reasons is reported as "bare CODE".
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from headrace.v1 import generation_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub
from headrace_client.commands.options import API_KEY_VARIABLE
from headrace_core.rpc import REASON_KEY, channel

_VOCAB = 1536
_CALL_TIMEOUT_S = 60.0
_ACTIVE_KINDS = 4
_BURST_S = 4.0
_PROMPT = "Once upon a time there was a wolf."


class Attacker:
    """What the kinds share."""

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        self.metadata = (("authorization", f"Bearer {token}"),)
        self.channel = channel(address)
        self.stub: Any = GenerationServiceStub(self.channel)
        self.random = random.Random(7)

    async def ask(
        self, request: pb.GenerateRequest, *, timeout_s: float = _CALL_TIMEOUT_S, stub: Any = None, token: bool = True
    ) -> str:
        """Send a request, read its whole answer and return the outcome."""
        call = (stub or self.stub).Generate(request, timeout=timeout_s, metadata=self.metadata if token else ())
        return await outcome(call)


async def outcome(call: Any) -> str:
    """Read a call to its end."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        reason = dict(error.trailing_metadata() or ()).get(REASON_KEY)
        if reason is None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return "DEADLINE_EXCEEDED"
        return str(reason) if reason else f"bare {error.code().name}"
    return "served"


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def text(prompt: str = _PROMPT, **sampling: Any) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    request.text.text = prompt
    request.sampling.max_tokens = sampling.pop("max_tokens", 8)
    for name, value in sampling.items():
        if isinstance(value, list | range):
            getattr(request.sampling, name).extend(value)
        else:
            setattr(request.sampling, name, value)
    return request


async def extreme_sampling(a: Attacker) -> str:
    """Parameters at the edges of their types."""
    tiny, huge = 1e-38, 3e38
    edges: list[dict[str, Any]] = [
        {"temperature": 0.9, "repetition_penalty": tiny},
        {"temperature": 0.9, "repetition_penalty": huge},
        {"temperature": tiny},
        {"temperature": huge},
        {"temperature": 1.0, "top_p": tiny},
        {"temperature": 1.0, "min_p": 1.0, "top_k": 4_000_000_000},
        {"temperature": 0.5, "repetition_penalty": tiny, "presence_penalty": -2.0, "frequency_penalty": -2.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1.0, "seed": 2**64 - 1},
    ]
    return await a.ask(text(**a.random.choice(edges)))


async def everything_is_a_stop(a: Attacker) -> str:
    """Every id ends the answer, and none may come before the end."""
    return await a.ask(text(stop_token_ids=range(_VOCAB), min_tokens=8, max_tokens=8))


async def many_stop_ids(a: Attacker) -> str:
    """1.9 million stop ids."""
    ids = [i % _VOCAB for i in range(1_900_000)]
    return await a.ask(text(stop_token_ids=ids, min_tokens=4, temperature=0.5))


async def every_token_banned(a: Attacker) -> str:
    """A bias against every id."""
    request = text(temperature=0.5)
    request.sampling.logit_bias.extend(types_pb2.LogitBias(token_id=i, bias=-100.0) for i in range(_VOCAB))
    return await a.ask(request)


async def empty_messages(a: Attacker) -> str:
    """900,000 messages that say nothing."""
    message = b"\x0a\x06\x0a\x04user"  # ChatPrompt.messages { role: "user" }
    chat = message * 900_000
    raw = a.channel.unary_stream("/headrace.v1.GenerationService/Generate")
    request = b"\x2a" + _varint(len(chat)) + chat  # GenerateRequest.chat
    return await outcome(raw(request, timeout=_CALL_TIMEOUT_S, metadata=a.metadata))


async def long_texts(a: Attacker) -> str:
    """A text of 3.9 MB."""
    return await a.ask(text("the fox and the bear " * 186_000), timeout_s=20)


async def bodies_without_token(a: Attacker) -> str:
    """6 MB from somebody who may not call."""
    return await a.ask(text("x" * 6_000_000), token=False)


async def bursts(a: Attacker) -> list[str]:
    """Two hundred calls at once on one connection; each is an attempt."""
    async with channel(a.address) as burst:
        stub = GenerationServiceStub(burst)
        return await asyncio.gather(*(a.ask(text(max_tokens=1), stub=stub) for _ in range(200)))


async def nonsense_bytes(a: Attacker) -> str:
    """Bytes that are no message."""
    raw = a.channel.unary_stream("/headrace.v1.GenerationService/Generate")
    return await outcome(raw(a.random.randbytes(200), timeout=_CALL_TIMEOUT_S, metadata=a.metadata))


async def too_long_for_prefill(a: Attacker) -> str:
    """A prompt that no prefill worker's pool can hold."""
    request = text()
    request.tokens.token_ids.extend([5] * 3_500)
    return await a.ask(request)


async def leave_early(a: Attacker) -> str:
    """Ask for a long answer and leave after the first piece."""
    call = a.stub.Generate(text(max_tokens=400, ignore_eos=True), timeout=_CALL_TIMEOUT_S, metadata=a.metadata)
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        return str(dict(error.trailing_metadata() or ()).get(REASON_KEY, f"bare {error.code().name}"))
    call.cancel()
    return "served"


async def never_read(a: Attacker) -> str:
    """Ask for sixteen long answers and read nothing until the end of one's patience."""
    request = text(max_tokens=200, ignore_eos=True, temperature=0.7)
    request.n = 16
    call = a.stub.Generate(request, timeout=_CALL_TIMEOUT_S, metadata=a.metadata)
    try:
        await call.wait_for_connection()
    except grpc.aio.AioRpcError as error:
        return str(dict(error.trailing_metadata() or ()).get(REASON_KEY, f"bare {error.code().name}"))
    await asyncio.sleep(a.random.random())
    call.cancel()
    return "served"


async def no_time(a: Attacker) -> str:
    """A deadline that can't be met."""
    return await a.ask(text(max_tokens=300), timeout_s=a.random.choice([0.001, 0.01, 0.1]))


async def dishonest_template(a: Attacker) -> str:
    """Roles and texts that a template may choke on."""
    request = pb.GenerateRequest()
    request.sampling.max_tokens = 4
    request.chat.messages.add(role=a.random.choice(["tool", "system", "", "user"]), content="{{ 1 / 0 }}" * 500)
    return await a.ask(request)


async def open_and_wait(a: Attacker) -> str:
    """Open a call and never send the request; the router must end it."""
    raw = a.channel.stream_stream("/headrace.v1.GenerationService/Generate")
    call = raw(timeout=_CALL_TIMEOUT_S, metadata=a.metadata)
    return await outcome(call)


Kind = Callable[[Attacker], Awaitable[str | list[str]]]
KINDS: dict[str, tuple[Kind, int]] = {
    # How many attempts a burst makes at a time.
    "extreme_sampling": (extreme_sampling, 4),
    "everything_is_a_stop": (everything_is_a_stop, 4),
    "many_stop_ids": (many_stop_ids, 1),
    "every_token_banned": (every_token_banned, 4),
    "empty_messages": (empty_messages, 1),
    "long_texts": (long_texts, 3),
    "bodies_without_token": (bodies_without_token, 3),
    "bursts": (bursts, 1),
    "nonsense_bytes": (nonsense_bytes, 4),
    "too_long_for_prefill": (too_long_for_prefill, 4),
    "leave_early": (leave_early, 4),
    "never_read": (never_read, 1),
    "no_time": (no_time, 4),
    "dishonest_template": (dishonest_template, 4),
    "open_and_wait": (open_and_wait, 8),
}


async def attack(address: str, token: str) -> dict[str, Any]:
    """Run bursts of several kinds at a time, until SIGTERM; return what became of them.

    Next comes the kind with the fewest attempts: on a busy machine the slow ones would else have few.
    """
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    attacker = Attacker(address, token)
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in KINDS}
    active: set[str] = set()
    samples: list[int] = []

    async def lane() -> None:
        while not stop.is_set():
            name = min(KINDS.keys() - active, key=lambda name: outcomes[name].total())
            active.add(name)
            await _burst(name, attacker, outcomes[name], stop)
            active.discard(name)

    async def watch() -> None:
        while not stop.is_set():
            samples.append(len(active))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.5)

    await asyncio.gather(watch(), *(lane() for _ in range(_ACTIVE_KINDS)))
    share = sum(count >= 3 for count in samples) / max(1, len(samples))
    await attacker.channel.close()
    return {"outcomes": outcomes, "share_with_three_kinds": share}


async def _burst(name: str, attacker: Attacker, counts: Counter[str], stop: asyncio.Event) -> None:
    kind, width = KINDS[name]
    ends_s = time.monotonic() + _BURST_S

    async def one() -> None:
        while time.monotonic() < ends_s and not stop.is_set():
            found = await kind(attacker)
            counts.update([found] if isinstance(found, str) else found)

    await asyncio.gather(*(one() for _ in range(width)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.report.write_text(json.dumps(asyncio.run(attack(arguments.address, os.environ[API_KEY_VARIABLE]))))


if __name__ == "__main__":
    main()
