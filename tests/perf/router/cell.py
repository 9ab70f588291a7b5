"""One measurement: so many clients, each with one answer after the other, of one side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import uvloop

from tests.perf.closed_loop import asking_target, closed_loop, percentiles
from tests.perf.router.sides import Side

_PROMPT = "In the beginning there was a small river and a mill. "


@dataclass(frozen=True)
class Cell:
    """What is asked: `requests` answers of `tokens` tokens, `streams` at once, each token `step_ms` after the last."""

    name: str
    streams: int
    tokens: int
    requests: int
    step_ms: float


async def measure(side: Side, cell: Cell) -> dict[str, Any]:
    """Return CPU µs of the router, and what its clients saw, ms; a few requests before it do not count."""
    target = side.target()
    ask = asking_target(target, cell.tokens)
    try:
        # As many connections as there will be are made before the clock runs.
        await closed_loop(asking_target(target, 2), [_PROMPT] * cell.streams, cell.streams)
        before_s, begin_s = side.cpu_s(), time.monotonic()
        times = await closed_loop(ask, [_PROMPT] * cell.requests, cell.streams)
        wall_s, router_s = time.monotonic() - begin_s, side.cpu_s() - before_s
    finally:
        await target.close()
    num_tokens = sum(request.num_tokens for request in times)
    gaps_s = [gap for request in times for gap in request.gaps_s()]
    return {
        "cpu_s": router_s,
        "us_per_token": 1e6 * router_s / num_tokens,
        "us_per_request": 1e6 * router_s / len(times),
        "tokens_per_s": num_tokens / wall_s,
        "tokens_per_delta": num_tokens / sum(len(request.deltas) for request in times),
        "ttft_ms": _percentiles([request.deltas[0][0] for request in times]),
        "itl_ms": _percentiles(gaps_s),
    }


def run(side: Side, cell: Cell) -> dict[str, Any]:
    """Do what `measure` does, on an event loop of its own."""
    return uvloop.run(measure(side, cell))


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    return percentiles([1e3 * each for each in seconds]) if seconds else None
