"""Clients that each ask again once they are answered: what they saw."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from headrace_client import AsyncClient
from headrace_client.bench.target import Target
from headrace_core.request import SamplingParams

PERCENTILES = (25, 50, 99)
_REQUEST_S = 600.0


@dataclass(frozen=True)
class RequestTimes:
    """One request as its client saw it: seconds from asking to each delta, and how many tokens it brought."""

    deltas: Sequence[tuple[float, int]]

    @property
    def num_tokens(self) -> int:
        """Tokens it brought."""
        return sum(count for _, count in self.deltas)

    def gaps_s(self) -> list[float]:
        """Return the gap before each token after the first delta's; tokens read together share theirs evenly."""
        return [gap for (last, _), (at, count) in pairwise(self.deltas) for gap in [(at - last) / count] * count]


Ask = Callable[[list[int]], Awaitable[RequestTimes]]
"""Asks a server to go on with a prompt, to the last token."""


def random_prompts(load: tuple[int, int], vocab_size: int, count: int, *, seed: int) -> list[list[int]]:
    """Return prompts of `load[0]` tokens, no two of which share a prefix; the same each time."""
    rng = random.Random(f"{load} {seed}")
    return [rng.choices(range(3, vocab_size), k=load[0]) for _ in range(count)]


async def closed_loop(ask: Ask, prompts: Sequence[list[int]], clients: int) -> list[RequestTimes]:
    """Let so many clients ask with the prompts, each with its next as soon as it has its answer."""
    left, times = iter(prompts), list[RequestTimes]()

    async def one_client() -> None:
        for prompt in left:
            times.append(await ask(prompt))

    await asyncio.gather(*(one_client() for _ in range(clients)))
    return times


def asking(client: AsyncClient, num_out: int) -> Ask:
    """Return what asks Headrace for `num_out` greedy tokens."""
    sampling = SamplingParams(max_tokens=num_out, temperature=0.0, ignore_eos=True)

    async def ask(prompt: list[int]) -> RequestTimes:
        deltas: list[tuple[float, int]] = []
        sent_s = time.monotonic()
        async with client.stream(prompt, sampling, timeout_s=_REQUEST_S) as stream:
            async for delta in stream:
                if delta.token_ids:
                    deltas.append((time.monotonic() - sent_s, len(delta.token_ids)))
        return RequestTimes(deltas)

    return ask


def asking_target(target: Target, num_out: int) -> Ask:
    """Return what asks a target of `headrace bench` for `num_out` greedy tokens.

    Raises when called:
        HeadraceError: it is refused, or cut short.
        RuntimeError: there were fewer tokens.
    """

    async def ask(prompt: list[int]) -> RequestTimes:
        deltas: list[tuple[float, int]] = []
        sent_s = time.monotonic()
        await target.ask(prompt, num_out, lambda count: deltas.append((time.monotonic() - sent_s, count)))
        times = RequestTimes(deltas)
        if times.num_tokens != num_out:
            raise RuntimeError(f"the server streamed {times.num_tokens} tokens of {num_out}")
        return times

    return ask


def cell_figures(load: tuple[int, int], clients: int, times: Sequence[RequestTimes], wall_s: float) -> dict[str, Any]:
    """Return a cell's percentiles: TTFT and each request's tokens per second over requests, ITL over all gaps."""
    return {
        "tokens_in": load[0],
        "tokens_out": load[1],
        "clients": clients,
        "requests": len(times),
        "ttft_ms": percentiles([request.deltas[0][0] * 1e3 for request in times]),
        "itl_ms": percentiles([gap * 1e3 for request in times for gap in request.gaps_s()]),
        "request_tokens_per_s": percentiles([request.num_tokens / request.deltas[-1][0] for request in times]),
        "tokens_per_s": sum(request.num_tokens for request in times) / wall_s,
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p25, p50 and p99."""
    found: list[float] = np.percentile(list(values), PERCENTILES).tolist()
    return {f"p{percent}": value for percent, value in zip(PERCENTILES, found, strict=True)}
