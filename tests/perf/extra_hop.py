"""What it adds to the time to the first token that the decode worker leads: beside asking the prefill worker directly.

Both ways are asked in turn, from the same process; what the prefill worker says that it queued and computed is taken
off each. A way by the decode worker is a message more there and one more back, and what both ends of these do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from headrace_core.request import SamplingParams
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.mini_taker import MiniTaker

PARAMS = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.0, seed=0)


def measure(prefill: str, decode: str, prompt: Callable[[], list[int]], num_requests: int) -> dict[str, list[float]]:
    """Return the milliseconds of each request by each way, and the `extra` of each pair."""
    return asyncio.run(_measure(prefill, decode, prompt, num_requests))


async def _measure(
    prefill: str, decode: str, prompt: Callable[[], list[int]], num_requests: int
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"direct": [], "by_decode": [], "extra": []}
    async with MiniTaker(prefill) as taker, MiniRouter(prefill=prefill, decode=decode) as router:
        for index in range(-2, num_requests):
            took: dict[str, float] = {}
            for way in sorted(("direct", "by_decode"), reverse=index % 2 == 0):
                ask: Any = (
                    _directly(taker, f"{way}{index}", prompt())
                    if way == "direct"
                    else _by_decode(router, f"{way}{index}", prompt())
                )
                took[way] = await ask
            if index >= 0:  # the first are for what is done once
                took["extra"] = took["by_decode"] - took["direct"]
                for name, ms in took.items():
                    found[name].append(ms)
    return found


async def _directly(taker: MiniTaker, request_id: str, prompt: list[int]) -> float:
    begun_s = time.perf_counter()
    ordered = taker.order(request_id, prompt, params=PARAMS)
    first = await ordered.wait_first()
    took_s = time.perf_counter() - begun_s
    queue_s = (await ordered.wait_admitted()).queue_s
    await ordered.cancel()
    return 1e3 * (took_s - queue_s - first.compute_s)


async def _by_decode(router: MiniRouter, request_id: str, prompt: list[int]) -> float:
    begun_s = time.perf_counter()
    collected = router.start(request_id, prompt, params=PARAMS)
    await collected.wait_tokens(1)
    took_s = time.perf_counter() - begun_s
    prefilled = collected.prefilled
    assert prefilled is not None, "it was computed there"
    await collected.tokens()
    return 1e3 * took_s - (prefilled.prefill_queue_us + prefilled.prefill_us) / 1e3
