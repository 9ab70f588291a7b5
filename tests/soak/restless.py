"""Clients that do not wait for their answers: they leave, give no time, or do not read."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Sequence

from headrace_client import AsyncClient
from headrace_core.errors import HeadraceError

from tests.load.clients import Answer, Request, fault_of

_TIMEOUT_S = 60.0
_AWAY_S = 0.5
KINDS = ("leaves", "has no time", "reads late")


async def run_restless(address: str, pairs: Sequence[tuple[Request, Answer]], until: asyncio.Event) -> dict[str, int]:
    """Ask again and again until `until` is set; return how often each kind ended how."""
    ends: Counter[str] = Counter()
    await asyncio.gather(*(_client(address, kind, pairs, ends, until) for kind in KINDS))
    return dict(ends)


async def _client(
    address: str, kind: str, pairs: Sequence[tuple[Request, Answer]], ends: Counter[str], until: asyncio.Event
) -> None:
    chance = random.Random(kind)
    async with AsyncClient(address) as client:
        for request, wanted in itertools.cycle(pairs):
            if until.is_set():
                return
            try:
                end = await _ask(client, kind, request, wanted, chance)
            except HeadraceError as error:
                end = error.reason
            ends[f"{kind}: {end}"] += 1


async def _ask(client: AsyncClient, kind: str, request: Request, wanted: Answer, chance: random.Random) -> str:
    most = chance.randrange(1, 20)
    timeout_s = chance.choice((0.01, 0.1, 1.0)) if kind == "has no time" else _TIMEOUT_S
    got: list[list[int]] = [[] for _ in range(request.n)]
    async with client.stream(request.prompt, request.params, n=request.n, timeout_s=timeout_s) as stream:
        async for delta in stream:
            got[delta.sample_index] += delta.token_ids
            if kind == "leaves" and sum(map(len, got)) > most:
                break
            if kind == "reads late":
                await asyncio.sleep(_AWAY_S * chance.random())
    for ids, (theirs, *_) in zip(got, wanted, strict=True):
        assert tuple(ids) == theirs[: len(ids)], f"{fault_of(((tuple(ids), '', ''),), ((theirs, '', ''),))}: {ids}"
    return "as far as it went"
