"""One line that shows how far a run is, while it runs; on a terminal it is written over, else it comes now and then."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

from headrace_client.bench.load import Tally
from headrace_client.bench.record import Record

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_TERMINAL_S = 0.5
_PIPE_S = 10.0
_MOST_SHOWN = 500
"""Of the last requests the median is of so many."""


def line_of(tally: Tally, tokens_per_s: float) -> str:
    """Return the line."""
    num_done = len(tally.records)
    parts = [f"{num_done}/{tally.num_requests} requests", f"{tally.num_under_way} under way"]
    parts.append(f"{tokens_per_s:.0f} tokens/s")
    if (ttft_ms := _median_ttft_ms(tally.records[-_MOST_SHOWN:])) is not None:
        parts.append(f"TTFT {ttft_ms:.0f} ms")
    if num_failed := sum(not record.is_ok for record in tally.records):
        parts.append(f"{num_failed} failed")
    return " · ".join(parts)


@asynccontextmanager
async def shown(tally: Tally, console: Console) -> AsyncGenerator[None]:
    """Show the tally on the console until the block is left."""
    if not console.is_terminal:
        async with _repeated(lambda rate: console.print(line_of(tally, rate)), tally, _PIPE_S):
            yield
        return
    with Status(line_of(tally, 0.0), console=console) as status:
        async with _repeated(lambda rate: status.update(line_of(tally, rate)), tally, _TERMINAL_S):
            yield


@asynccontextmanager
async def _repeated(show: Callable[[float], None], tally: Tally, interval_s: float) -> AsyncGenerator[None]:
    async def run() -> None:
        num_tokens = tally.num_tokens
        while True:
            await asyncio.sleep(interval_s)
            show((tally.num_tokens - num_tokens) / interval_s)
            num_tokens = tally.num_tokens

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()


def _median_ttft_ms(records: Sequence[Record]) -> float | None:
    times_s = [record.ttft_s for record in records if record.is_ok]
    return 1e3 * statistics.median(times_s) if times_s else None
