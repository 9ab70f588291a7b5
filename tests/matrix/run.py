"""Plays many cells, several at a time: most of them wait for a process to be noticed missing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tests.matrix.asking import OTHER_PROMPT, PARAMS, PROMPT, alone
from tests.matrix.cell import Result, play
from tests.matrix.table import Cell

SIDE_BY_SIDE = 7
"""A row of the table at a time."""

Wanted = Sequence[Sequence[int]]


def transports() -> list[str]:
    """Return the transports between processes."""
    from headrace_core.transfer.transports import TRANSPORTS

    return [name for name in TRANSPORTS if name != "fake"]


async def wanted_tokens() -> Wanted:
    """Return the tokens of the two prompts of a cell, computed alone."""
    return [samples[0] for samples in await alone([(prompt, PARAMS, 1) for prompt in (PROMPT, OTHER_PROMPT)])]


async def play_all(
    cells: Sequence[Cell], wanted: Wanted, *, on_result: Callable[[Result], None] = lambda result: None
) -> list[Result]:
    """Play cells and return their results, in order; `wanted` is what `wanted_tokens` returned."""
    places = asyncio.Semaphore(SIDE_BY_SIDE)

    async def play_one(cell: Cell) -> Result:
        async with places:
            result = await play(cell, wanted)
        on_result(result)
        return result

    return await asyncio.gather(*(play_one(cell) for cell in cells))
