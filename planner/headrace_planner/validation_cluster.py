"""Measures cells on a real local cluster: one prefill worker, one decode worker, a router, this process as client.

A trial serves the requests of `trial_workload`, in that order, in a closed loop. Prompts are random token ids, so no
prefix is shared. Trials are taken in rounds over all cells, since a machine's speed drifts while it is measured: what
slows one round down slows down every cell of it. A trial during which other programs used much of the machine is
taken again, a few times at most. Each trial is written down at once: a run that was interrupted goes on where it
stopped.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from headrace_client import AsyncClient, SamplingParams
from headrace_client.cluster.cluster_process import ClusterProcess
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.metrics_page import read_metrics
from prometheus_client.parser import text_string_to_metric_families

from headrace_planner.machine_use import machine_use
from headrace_planner.validation import Cell, RequestTimes, StepSums, Trial, trial_workload

WORKER_OPTIONS = {"threads": 1, "max-step-tokens": 1024, "max-step-sequences": 64, "kv-pool-mib": 256}
_TIMEOUT_S = 120.0
_MAX_TRIES = 4
_PAUSE_S = 5.0
"""Before a trial is taken again: what disturbed it may have gone."""
_WARM_UP = (Cell(64, 16, 8), Cell(1024, 16, 8))


def measure_rounds(
    model_dir: Path, cells: Sequence[Cell], saved: Path, *, num_rounds: int, report: Callable[[str], None] = print
) -> list[Trial]:
    """Measure the trials that `saved` (JSON lines) does not have yet, add each to it, return all of `cells`.

    Raises:
        HeadraceError: the cluster does not start or a request fails.
    """
    done = {(trial.cell, trial.round): trial for trial in read_saved(saved)}
    wanted = [(cell, number) for number in range(num_rounds) for cell in cells]
    missing = [key for key in wanted if key not in done]
    if missing:
        saved.parent.mkdir(parents=True, exist_ok=True)
        with LocalCluster(model_dir, worker_options=WORKER_OPTIONS) as cluster, saved.open("a") as file:
            for cell in _WARM_UP:
                asyncio.run(_serve(cluster.router_address, cell, -1, 0))
            for count, (cell, number) in enumerate(missing):
                trial = done[cell, number] = undisturbed(partial(measure_trial, cluster, cell, number), report)
                file.write(json.dumps(trial.as_json()) + "\n")
                file.flush()
                report(f"[{count + 1}/{len(missing)}] round {number}, {cell.name}: {trial.wall_s:.1f} s")
    return [done[key] for key in wanted]


def read_saved(path: Path) -> Iterator[Trial]:
    """Yield the trials of an earlier run; none if there was none."""
    if path.is_file():
        yield from (Trial.from_json(json.loads(line)) for line in path.read_text().splitlines())


def undisturbed(measure: Callable[[int], Trial], report: Callable[[str], None], *, pause_s: float = _PAUSE_S) -> Trial:
    """Call `measure(0)`, `measure(1)`, ... until other programs leave it alone; else return the least disturbed."""
    trials: list[Trial] = []
    for attempt in range(_MAX_TRIES):
        if attempt:
            time.sleep(pause_s)
        trial = measure(attempt)
        trials.append(trial)
        if not trial.is_disturbed:
            break
        report(f"round {trial.round}, {trial.cell.name}: others used {trial.others_share:.0%} of the machine")
    best = min(trials, key=lambda trial: trial.others_share or 0.0)
    return replace(best, num_discarded=len(trials) - 1)


def measure_trial(cluster: LocalCluster, cell: Cell, number: int, attempt: int) -> Trial:
    """Run round `number` of one cell."""
    before = [read_steps(worker) for worker in cluster.workers]
    use_before, began_s = machine_use(), time.monotonic()
    requests = asyncio.run(_serve(cluster.router_address, cell, number, attempt))
    wall_s, others_share = time.monotonic() - began_s, machine_use().others_share(use_before)
    prefill, decode = (read_steps(worker).since(start) for worker, start in zip(cluster.workers, before, strict=True))
    return Trial(cell, number, requests, prefill, decode, wall_s, others_share)


def read_steps(worker: ClusterProcess) -> StepSums:
    """Return how many steps a worker ran, their seconds and their tokens, from its metrics."""
    families = text_string_to_metric_families(read_metrics(worker.metrics_address, _TIMEOUT_S))
    values = {sample.name: sample.value for family in families for sample in family.samples}
    names = ("headrace_step_seconds_count", "headrace_step_seconds_sum", "headrace_step_tokens_total")
    return StepSums(*(values[name] for name in names))


async def _serve(address: str, cell: Cell, number: int, attempt: int) -> list[RequestTimes]:
    """Serve a trial's requests in a closed loop; return their times in the order in which they were asked for."""
    lengths = [int(count) for count in trial_workload(cell, number).num_output]
    # Other prompts in every attempt: the same ones would be in the prefix cache.
    rng = random.Random(f"{cell.name} {number} {attempt}")
    # Made before the clock runs: a client that makes prompts delays the others' tokens.
    prompts = [[rng.randrange(16, 1024) for _ in range(cell.isl)] for _ in lengths]
    times: dict[int, RequestTimes] = {}
    left = iter(range(len(lengths)))
    async with AsyncClient(address) as client:

        async def one_client() -> None:
            for index in left:
                times[index] = await _request(client, prompts[index], lengths[index])

        await asyncio.gather(*(one_client() for _ in range(cell.concurrency)))
    return [times[index] for index in range(len(lengths))]


async def _request(client: AsyncClient, prompt: list[int], num_output: int) -> RequestTimes:
    sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
    first_s = second_s = last_s = 0.0
    num_tokens = 0
    sent_s = time.monotonic()
    async with client.stream(prompt, sampling, timeout_s=_TIMEOUT_S) as stream:
        async for delta in stream:
            if delta.token_ids:
                last_s = time.monotonic() - sent_s
                first_s, second_s = (first_s or last_s), (second_s or (last_s if num_tokens else 0.0))
                num_tokens += len(delta.token_ids)
    return RequestTimes(first_s, second_s or last_s, last_s, num_tokens)
