"""What a decode step of each layout costs on its critical path, and what it sends: for `tests.perf.parallel`.

Real ranks over gloo with the demo model. Ranks share this machine's cores, so what counts is each rank's CPU time,
which waiting does not add to: a layer takes as long as the rank that computes longest in it, and a step is the sum of
that over layers, with what comes before the first and after the last. Beside it the bytes that all ranks counted, and
both by formula: `ranks.traffic`, and the roofline of one core, whose time for each operation is fitted to one process
alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from headrace_core.families.config_json import parse_config
from headrace_core.model.load import load_model
from headrace_core.model.model import Model
from headrace_core.ranks.group import ALONE, RankGroup, Ranks, ranks_of
from headrace_core.ranks.layout import ExpertsBy, ParallelLayout
from headrace_core.ranks.sharding import Sharding
from headrace_core.ranks.traffic import step_bytes
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.hardware_measure import cpu_hardware
from headrace_core.roofline.model_shape import Dtype, ModelShape
from headrace_core.roofline.operations import StepLoad
from headrace_core.roofline.roofline import Roofline, predict_step
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_core.testing.rank_processes import run_ranks

ATTENTION, EXPERTS = ("tp1", "tp2", "dp2"), ("tp2", "ep2", "ep4")
BATCHES = (8, 32, 128)
_CONTEXT, _WARM, _STEPS = 64, 2, 10
_PAGE_SIZE, _MAX_STEP_TOKENS = 16, 512
_ITEMSIZE = 2
_READ_BYTES, _REPEATS = 128 << 20, 7


class Measured(NamedTuple):
    """Of one rank: CPU seconds of each step's parts (the layers, and what is around them), and bytes a step."""

    parts_s: list[list[float]]
    sent_bytes: float


def measure_layouts(folder: Path, tokens: list[int]) -> dict[str, Any]:
    """Return what each layout's decode step takes, beside one process's; `tokens` are a text to compute."""
    shape, hardware = ModelShape.load(str(folder)), _one_core()
    layouts = {name: ParallelLayout.parse(*name) for name in ((a, e) for a in ATTENTION for e in EXPERTS)}
    alone = _by_batch(run_ranks(1, measure_rank, folder, [None], tokens))
    found: list[dict[str, Any]] = []
    fitted = {batch: _fitted(shape, hardware, batch, _critical_s(alone[None, batch])) for batch in BATCHES}
    for size in sorted({layout.size for layout in layouts.values()}):
        once = {layout: name for name, layout in reversed(layouts.items()) if layout.size == size}
        by_case = _by_batch(run_ranks(size, measure_rank, folder, list(once.values()), tokens))
        for layout, name in once.items():
            names = [" × ".join(each) for each, other in layouts.items() if other == layout]
            for batch in BATCHES:
                of_ranks = by_case[name, batch]
                predicted = _predicted(shape, fitted[batch], layout, batch).time_s
                found.append(_row(folder, names, layout, batch, of_ranks, predicted))
    return {
        "context": _CONTEXT,
        "one_core": {"source": hardware.source, "memory_bytes_per_s": hardware.memory_bytes_per_s,
                     "flops_per_s": hardware.flops_per_s(Dtype.FP32), "copy_bytes_per_s": hardware.link_bytes_per_s,
                     "fitted_overhead_us": {batch: each.operation_overhead_s * 1e6 for batch, each in fitted.items()}},
        "one_process": {batch: {"step_us": _critical_s(alone[None, batch]) * 1e6, "samples_us": _us(alone[None, batch])}
                        for batch in BATCHES},
        "layouts": found,
    }  # fmt: skip


def measure_rank(
    world: RankGroup, folder: Path, names: list[tuple[str, str] | None], tokens: list[int]
) -> dict[tuple[tuple[str, str] | None, int], Measured]:
    """Return what this rank does in each case, on every rank."""
    found: dict[tuple[tuple[str, str] | None, int], Measured] = {}
    for name in names:
        ranks = ranks_of(ParallelLayout.parse(*name), world) if name else ALONE
        model = load_model(folder, ranks=ranks)
        for batch in BATCHES:
            found[name, batch] = _measure(model, ranks, batch, tokens)
    return found


def _measure(model: Model, ranks: Ranks, batch: int, tokens: list[int]) -> Measured:
    pages = -(-(_CONTEXT + _WARM + _STEPS) // _PAGE_SIZE)
    sequences = PagedSequences(model, page_size=_PAGE_SIZE, num_pages=batch * pages, is_poisoned=False)

    def texts(start: int, count: int) -> list[list[int]]:
        # Each sequence reads another part of the text.
        return [[tokens[(97 * key + start + i) % len(tokens)] for i in range(count)] for key in range(batch)]

    def forward(keys: range, pieces: list[list[int]], marks: list[float]) -> None:
        chunks = [
            replace(sequences.chunk(key, pieces[key], is_sampled=True), lane=key % ranks.layout.num_lanes)
            for key in keys
        ]
        marks.append(time.thread_time())
        model.forward(chunks, sequences.cache, on_layer=lambda _: marks.append(time.thread_time()))
        marks.append(time.thread_time())

    prompts, at_once = texts(0, _CONTEXT), _MAX_STEP_TOKENS // _CONTEXT
    for first in range(0, batch, at_once):
        forward(range(first, min(batch, first + at_once)), prompts, [])
    groups = list({id(group): group for group in (ranks.world, ranks.lane)}.values())
    parts_s: list[list[float]] = []
    before = 0
    for step in range(_WARM + _STEPS):
        if step == _WARM:
            before = sum(group.sent_bytes for group in groups)
        marks: list[float] = []
        forward(range(batch), texts(_CONTEXT + step, 1), marks)
        if step >= _WARM:
            parts_s.append([end - start for start, end in pairwise(marks)])
    return Measured(parts_s, (sum(group.sent_bytes for group in groups) - before) / _STEPS)


def _by_batch(
    of_ranks: list[dict[tuple[tuple[str, str] | None, int], Measured]],
) -> dict[tuple[tuple[str, str] | None, int], list[Measured]]:
    return {case: [found[case] for found in of_ranks] for case in of_ranks[0]}


def _critical_s(of_ranks: list[Measured]) -> float:
    """Return the median over steps of what ranks that wait for each other after every layer take."""
    steps = zip(*(each.parts_s for each in of_ranks), strict=True)
    return statistics.median(sum(max(part) for part in zip(*step, strict=True)) for step in steps)


def _row(
    folder: Path, names: list[str], layout: ParallelLayout, batch: int, of_ranks: list[Measured], predicted_s: float
) -> dict[str, Any]:
    lanes = [len(range(lane, batch, layout.num_lanes)) for lane in range(layout.num_lanes)]
    config = parse_config(folder)
    expected = step_bytes(config, Sharding(layout, 0), lanes, lanes, _ITEMSIZE).total
    return {
        "names": names,
        "ranks": layout.size,
        "batch": batch,
        "step_us": _critical_s(of_ranks) * 1e6,
        "step_us_predicted": predicted_s * 1e6,
        "bytes_per_token": sum(each.sent_bytes for each in of_ranks) / batch,
        "bytes_per_token_by_formula": expected / batch,
        "samples_us": _us(of_ranks),
    }


def _us(of_ranks: list[Measured]) -> list[list[list[float]]]:
    """Return microseconds by rank, step and part."""
    return [[[round(part * 1e6, 1) for part in step] for step in each.parts_s] for each in of_ranks]


def _one_core() -> Hardware:
    """Return one core of this machine as hardware, by its CPU time as ranks are measured: others may be at work."""
    torch.set_num_threads(1)
    source, target, matrix = torch.ones(_READ_BYTES // 4), torch.empty(_READ_BYTES // 4), torch.ones(1024, 1024)
    multiply_s = _cpu_s(lambda: matrix @ matrix)
    return cpu_hardware(
        {Dtype.FP32: 2 * 1024**3 / multiply_s},
        memory_bytes_per_s=_READ_BYTES / _cpu_s(source.max),
        copy_bytes_per_s=_READ_BYTES / _cpu_s(lambda: target.copy_(source)),
        source="one core, by CPU time: an FP32 matrix product, reading memory, copying it",
    )


def _cpu_s(measured: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.thread_time()
        measured()
        best = min(best, time.thread_time() - began)
    return best


def _fitted(shape: ModelShape, hardware: Hardware, batch: int, measured_s: float) -> Hardware:
    """Return the hardware with the time for each operation that makes one process's prediction what was measured."""
    roof = _predicted(shape, hardware, ParallelLayout(), batch)
    runs = sum(row.operation.runs for row in roof.operations if not row.operation.is_overlapped)
    return hardware.derated(operation_overhead_s=max(0.0, measured_s - roof.time_s) / runs)


def _predicted(shape: ModelShape, hardware: Hardware, layout: ParallelLayout, batch: int) -> Roofline:
    ep = layout.size if layout.experts_by is ExpertsBy.EXPERT else 1
    parallel = Parallelism(layout.attention_tp, layout.num_lanes, ep)
    return predict_step(shape, hardware, StepLoad.decode(batch, batch * (_CONTEXT + _WARM + _STEPS / 2)), parallel)
