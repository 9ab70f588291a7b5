"""Measures the grid on a real local cluster: one prefill worker, one decode worker, a router, this process as client.

Each cell is a closed loop for some seconds, warmed up by one request per client. Prompts are random token ids, so no
prefix is shared. Finished cells are written down at once: a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headrace_client import AsyncClient
from headrace_core.local_cluster import LocalCluster
from headrace_core.request import SamplingParams

from headrace_planner.validation import Cell, Measured, Outcome, as_json, closed_throughput, from_json

WORKER_OPTIONS = {"threads": 1, "max-step-tokens": 1024, "max-step-sequences": 64, "kv-pool-mib": 256}


@dataclass(slots=True)
class _Samples:
    ttft_s: list[float] = field(default_factory=list[float])
    gaps_s: list[float] = field(default_factory=list[float])
    durations_s: list[float] = field(default_factory=list[float])
    prefill_s: list[float] = field(default_factory=list[float])
    handoff_s: list[float] = field(default_factory=list[float])


def measure_grid(
    model_dir: Path, cells: Sequence[Cell], saved: Path, *, cell_s: float = 4.0, report: Callable[[str], None] = print
) -> list[Measured]:
    """Measure the cells that `saved` does not have yet, write each there, return all.

    Raises:
        HeadraceError: the cluster does not start or a request fails.
    """
    done = {m.cell: m for m in read_saved(saved)}
    missing = [cell for cell in cells if cell not in done]
    if missing:
        with LocalCluster(model_dir, worker_options=WORKER_OPTIONS) as cluster:
            asyncio.run(_warm_up(cluster.router_address))
            for index, cell in enumerate(missing):
                outcome = asyncio.run(measure_cell(cluster.router_address, cell, cell_s=cell_s))
                done[cell] = Measured(cell, outcome)
                saved.parent.mkdir(parents=True, exist_ok=True)
                saved.write_text(json.dumps([as_json(m) for m in done.values()], indent=1))
                report(
                    f"[{index + 1}/{len(missing)}] {cell.name}: TTFT {outcome.ttft_s * 1e3:.1f} ms, "
                    f"ITL {outcome.itl_s * 1e3:.2f} ms, {outcome.throughput:.0f} tok/s, {outcome.num_requests} requests"
                )
    return [done[cell] for cell in cells]


def read_saved(path: Path) -> list[Measured]:
    """Return the cells of an earlier run; none if there was none."""
    return [from_json(value) for value in json.loads(path.read_text())] if path.is_file() else []


async def measure_cell(address: str, cell: Cell, *, cell_s: float) -> Outcome:
    """Run one cell against a router for about `cell_s` seconds; every client's first request is not counted."""
    samples = _Samples()
    async with AsyncClient(address) as client:
        began_s = time.monotonic()

        async def one_client(number: int) -> None:
            rng = random.Random(hash((cell.isl, cell.osl, number)))
            count, least = 0, 5 if cell.concurrency == 1 else 3
            while count < least or time.monotonic() - began_s < cell_s:
                await _request(client, cell, rng, samples if count else _Samples())
                count += 1

        await asyncio.gather(*(one_client(number) for number in range(cell.concurrency)))
    return Outcome(
        statistics.median(samples.ttft_s),
        statistics.fmean(samples.gaps_s),
        closed_throughput(cell, statistics.fmean(samples.durations_s)),
        len(samples.ttft_s),
        statistics.median(samples.prefill_s),
        statistics.median(samples.handoff_s),
    )


async def _request(client: AsyncClient, cell: Cell, rng: random.Random, samples: _Samples) -> None:
    prompt = [rng.randrange(16, 1024) for _ in range(cell.isl)]
    sampling = SamplingParams(max_tokens=cell.osl, temperature=0.0, ignore_eos=True)
    sent_s = last_s = time.monotonic()
    num_tokens = 0
    async with client.stream(prompt, sampling, include_timings=True, timeout_s=120) as stream:
        async for delta in stream:
            now_s, count = time.monotonic(), len(delta.token_ids)
            if count:
                _take_tokens(samples, num_tokens, count, now_s - (last_s if num_tokens else sent_s))
                num_tokens, last_s = num_tokens + count, now_s
            if delta.timings:
                phases = {phase.name: phase.duration_us / 1e6 for phase in delta.timings.phases}
                samples.prefill_s.append(phases.get("prefill", 0.0))
    samples.durations_s.append(last_s - sent_s)


def _take_tokens(samples: _Samples, num_before: int, count: int, gap_s: float) -> None:
    """Tokens that came together share the gap, as in the router's own metric."""
    if not num_before:
        samples.ttft_s.append(gap_s)
        return
    if num_before == 1:
        samples.handoff_s.append(gap_s / count)
    samples.gaps_s.extend([gap_s / count] * count)


async def _warm_up(address: str) -> None:
    async with AsyncClient(address) as client:
        for isl in (64, 1024):
            await asyncio.gather(*(_request(client, Cell(isl, 16, 1), random.Random(i), _Samples()) for i in range(8)))
