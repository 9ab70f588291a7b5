"""What two micro-batches gain a decode step whose ranks are some milliseconds apart.

    python -m tests.perf.two_batches

Two ranks of one thread each, in two network namespaces with a delay between them (`delay_line`; needs root), compute
decode steps of a checkpoint of 280M random parameters, at once and as two micro-batches, by turns. Per layout, rows and
delay it prints medians:

    step          of rank 0, from start to end, at once and as two
    CPU           of rank 0 in it: what it computes, and what its network costs it; no step is shorter
    travel        the meetings of a step, each as long as one of a single number: what a step at once takes besides
    floor         of a step as two: the larger of its CPU time, and of travel and half of that

Ranks compute before anything else on the machine does (SCHED_RR), and their network's threads before them, as if these
had a core of their own: woken, they would else wait for those who compute. Writes build/bench/two-batches.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from headrace_core.families.config import ModelConfig
from headrace_core.model.load import load_model
from headrace_core.model.model import Model
from headrace_core.ranks.group import RankGroup, Ranks, ranks_of
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.sharding import ExpertsForm, Sharding
from headrace_core.ranks.torch_group import join
from headrace_core.ranks.two_batches import with_two_batches
from headrace_core.testing.paged_sequences import PagedSequences

from tests.perf.checkpoint_280m import write
from tests.perf.delay_line import ADDRESSES, delay_line
from tests.perf.machine import machine
from tests.perf.report_file import merge

_log = logging.getLogger(__name__)
_REPORT, _CHECKPOINT = Path("build/bench/two-batches.json"), Path("build/checkpoint-280m")
_LAYOUTS = (("dp2", "ep2"), ("tp2", "ep2"))
_CONTEXT, _PAGE_SIZE = 16, 32
_NEVER = 1 << 30
_KINDS = {"at once": _NEVER, "as two": 2}
"""From how many rows of a lane on a step is two micro-batches."""
_PORT = 29541
_MEETINGS = 51
_COMPUTE, _NETWORK = 40, 50
_MODULE = "tests.perf.two_batches"


def main() -> None:
    """Measure and write the report; or, with --rank, be a rank of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays-ms", type=float, nargs="+", default=[0.0, 1.0, 5.0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 192], help="of both ranks together")
    parser.add_argument("--steps", type=int, default=7, help="of either kind; two more are not counted")
    parser.add_argument("--json", type=Path, default=_REPORT)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Namespaces go whatever ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if arguments.rank >= 0:
        sys.stdout.write(json.dumps(_rank(arguments.rank, arguments.rows, arguments.steps)) + "\n")
        return
    write(_CHECKPOINT)
    cases: list[dict[str, Any]] = []
    kind = ""
    for delay_ms in arguments.delays_ms:
        kind, found = _at_delay(delay_ms, arguments.rows, arguments.steps)
        cases += found
    values = {"machine": machine(), "command": sys.argv, "delayed_by": kind, "cases": cases}
    merge(arguments.json, values)
    _log.info("%s", arguments.json)


def _at_delay(delay_ms: float, rows: list[int], steps: int) -> tuple[str, list[dict[str, Any]]]:
    """Return what delays, and a case of each layout and number of rows."""
    with delay_line(delay_ms / 1000) as line:
        started = [
            subprocess.Popen(
                line.command(rank, [sys.executable, "-m", _MODULE, *_options(rank, rows, steps)]),
                stdout=subprocess.PIPE,
                env={**os.environ, "GLOO_SOCKET_IFNAME": line.device},
            )
            for rank in range(2)
        ]
        try:
            said = [json.loads(rank.communicate(timeout=1200)[0]) for rank in started]
        finally:
            for rank in started:
                rank.kill()
    cases = [_case(delay_ms, *of_ranks) for of_ranks in zip(*said, strict=True)]
    return line.kind, cases


def _options(rank: int, rows: list[int], steps: int) -> list[str]:
    return ["--rank", str(rank), "--steps", str(steps), "--rows", *map(str, rows)]


def _case(delay_ms: float, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the medians of one layout and number of rows, and say them; `first` and `second`: the ranks' samples."""
    taken = first["taken"]
    step, cpu = ([1000 * statistics.median(taken[kind][name]) for kind in _KINDS] for name in ("step_s", "cpu_s"))
    travel = 1000 * first["meetings"] * first["meeting_s"]
    case = {
        "layout": first["layout"],
        "rows": first["rows"],
        "delay_ms": delay_ms,
        "step_ms": step,
        "gain": statistics.median(a / b for a, b in zip(*(taken[kind]["step_s"] for kind in _KINDS), strict=True)),
        "cpu_ms": cpu,
        "travel_ms": travel,
        "floors_ms": [cpu[0] + travel, max(cpu[1], travel + cpu[1] / 2)],
        "largest_difference": first["largest_difference"],
        "same_tokens": first["same_tokens"],
        "samples": [first, second],
    }
    _log.info(
        "%s, %d rows, %g ms: step %.1f -> %.1f ms (%.2f x), CPU %.1f -> %.1f, travel %.1f, floors %.1f -> %.1f, "
        "logits differ by %.1e at most, same tokens %.3f",
        case["layout"], case["rows"], delay_ms, *step, case["gain"], *cpu, travel, *case["floors_ms"],
        case["largest_difference"], case["same_tokens"],
    )  # fmt: skip
    return case


def _rank(rank: int, all_rows: list[int], steps: int) -> list[dict[str, Any]]:
    """Be one of the ranks; return samples of each layout and number of rows."""
    torch.set_num_threads(1)
    _run_before_others(_NETWORK)
    world = join(2, rank=rank, init_method=f"tcp://{ADDRESSES[0]}:{_PORT}", device="cpu", timeout_s=600)
    found: list[dict[str, Any]] = []
    for names in _LAYOUTS:
        layout = ParallelLayout.parse(*names)
        # Threads have the priority of whoever makes them.
        _run_before_others(_NETWORK)
        ranks = with_two_batches(ranks_of(layout, world), _NEVER)
        _run_before_others(_COMPUTE)
        model = load_model(_CHECKPOINT, ranks=ranks)
        about = {
            "layout": str(layout),
            "meetings": _meetings(model.config, layout),
            "meeting_s": statistics.median(_meeting_s(world) for _ in range(_MEETINGS)),
        }
        found += [{**about, "rows": rows, **_samples(model, ranks, rows, steps)} for rows in all_rows]
    world.gather_bytes(b"")
    return found


def _run_before_others(priority: int) -> None:
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))


def _meeting_s(world: RankGroup) -> float:
    began_s = time.perf_counter()
    world.all_gather(torch.zeros(1))
    return time.perf_counter() - began_s


def _meetings(config: ModelConfig, layout: ParallelLayout) -> int:
    """Return how often two ranks wait for each other in a decode step: once for each sum, thrice for a dispatch."""
    mixtures = sum(config.is_moe_layer(layer) for layer in range(config.num_layers))
    if Sharding(layout, 0).experts_form is ExpertsForm.DISPATCHED:
        return 3 * mixtures + 1
    # Embedding, attention, dense layers or experts, logits.
    return 1 + 2 * config.num_layers + 1


def _samples(model: Model, ranks: Ranks, rows: int, steps: int) -> dict[str, Any]:
    """Return the seconds of each step and of its CPU, either kind, and how far its logits differ on rank 0."""
    assert ranks.turns is not None
    pages_each = -(-(_CONTEXT + steps + 2) // _PAGE_SIZE)
    sequences = PagedSequences(model, page_size=_PAGE_SIZE, num_pages=rows * pages_each)
    taken: dict[str, dict[str, list[float]]] = {kind: {"step_s": [], "cpu_s": []} for kind in _KINDS}
    largest, num_same = 0.0, 0
    for number in range(-3, steps):
        # The first are the contexts, then two for caches to warm.
        length = _CONTEXT if number == -3 else 1
        chunks = [
            replace(
                sequences.chunk(key, [5 + (key * 31 + number * 7 + i * 11) % 900 for i in range(length)]),
                lane=key % ranks.layout.num_lanes,
            )
            for key in range(rows)
        ]
        logits: list[torch.Tensor] = []
        for kind, ranks.turns.least_rows in _KINDS.items():
            if number == -3 and kind != "at once":
                continue
            ranks.world.all_gather(torch.zeros(1))
            began = time.perf_counter(), time.process_time()
            logits.append(model.forward(chunks, sequences.cache))
            ended = time.perf_counter(), time.process_time()
            if number >= 0:
                for samples, before, after in zip(taken[kind].values(), began, ended, strict=True):
                    samples.append(after - before)
        if len(logits[0]) and number >= 0:
            largest = max(largest, float((logits[0] - logits[1]).abs().max()))
            num_same += int((logits[0].argmax(dim=1) == logits[1].argmax(dim=1)).sum())
    return {"taken": taken, "largest_difference": largest, "same_tokens": num_same / (rows * steps)}


if __name__ == "__main__":
    main()
