"""What a decode step of each layout costs on its critical path, and what it sends: for `tests.perf.parallel`.

Real ranks over gloo with the demo model. Ranks share this machine's cores, so what counts is each rank's CPU time,
which waiting does not add to: a layer takes as long as the rank that computes longest in it, and a step is the sum of
that over layers, with what comes before the first and after the last. Beside it the bytes that all ranks counted, and
both by formula: `ranks.traffic`, and the roofline of one core. Three of its numbers are fitted, to as many steps: what
an operation costs to start and what it reaches of the peak to one process alone, what a collective costs to one layout.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
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
from headrace_core.roofline.roofline import Roofline, predict_step
from headrace_core.roofline.step_load import StepLoad
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_core.testing.rank_processes import run_ranks

ATTENTION, EXPERTS = ("tp1", "tp2", "dp2"), ("tp2", "ep2", "ep4")
BATCHES = (8, 32, 128)
_CONTEXT, _WARM, _STEPS = 64, 2, 30
_PAGE_SIZE, _MAX_STEP_TOKENS = 16, 512
_ITEMSIZE = 2
_FITTED = ("tp2", "tp2")
"""The layout whose step with the fewest rows says what a collective costs."""
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
    fitted = _fitted_alone(shape, hardware, {batch: _critical_s(alone[None, batch]) for batch in BATCHES})
    for size in sorted({layout.size for layout in layouts.values()}):
        once = {layout: name for name, layout in reversed(layouts.items()) if layout.size == size}
        by_case = _by_batch(run_ranks(size, measure_rank, folder, list(once.values()), tokens))
        if (_FITTED, BATCHES[0]) in by_case:
            fitted = _fitted(shape, fitted, layouts[_FITTED], BATCHES[0], _critical_s(by_case[_FITTED, BATCHES[0]]))
        for layout, name in once.items():
            names = [" × ".join(each) for each, other in layouts.items() if other == layout]
            for batch in BATCHES:
                of_ranks = by_case[name, batch]
                predicted = _predicted(shape, fitted, layout, batch).time_s
                found.append(_row(folder, names, layout, batch, of_ranks, predicted))
    return {
        "context": _CONTEXT,
        "one_core": {"source": hardware.source, "memory_bytes_per_s": hardware.memory_bytes_per_s,
                     "flops_per_s": hardware.flops_per_s(Dtype.FP32), "copy_bytes_per_s": hardware.link_bytes_per_s,
                     "fitted": {"operation_overhead_us": fitted.operation_overhead_s * 1e6,
                                "share_of_peak": fitted.flops_per_s(Dtype.FP32) / hardware.flops_per_s(Dtype.FP32),
                                "collective_start_us": fitted.collective_start_s * 1e6}},
        "one_process": {
            batch: {
                "step_us": _critical_s(alone[None, batch]) * 1e6,
                "step_us_predicted": _alone_s(shape, fitted, batch) * 1e6,
                "samples_us": _us(alone[None, batch]),
            }
            for batch in BATCHES
        },
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


def _fitted_alone(shape: ModelShape, hardware: Hardware, alone_s: Mapping[int, float]) -> Hardware:
    """Return the hardware as one process shows it: what an operation costs to start, and what of the peak it reaches.

    The first from the fewest rows, the second from the most; what is between, and all groups, is predicted.
    """
    few, most = min(alone_s), max(alone_s)
    share = overhead_s = 1.0
    for _ in range(8):
        with_share = hardware.derated(flops=share)
        overhead_s = _solved(
            lambda value, h=with_share: _alone_s(shape, h.derated(operation_overhead_s=value), few), alone_s[few], 1e-8
        )
        share = 1 / _solved(
            lambda value, o=overhead_s: _alone_s(
                shape, hardware.derated(flops=1 / value, operation_overhead_s=o), most
            ), alone_s[most], 1.0,
        )  # fmt: skip
    return hardware.derated(flops=share, operation_overhead_s=overhead_s)


def _fitted(shape: ModelShape, hardware: Hardware, layout: ParallelLayout, batch: int, measured_s: float) -> Hardware:
    """Return the hardware with what a collective costs to start, from one layout's step."""

    def with_start(seconds: float) -> Hardware:
        return replace(hardware, collective_start_s=seconds)

    start_s = _solved(lambda value: _predicted(shape, with_start(value), layout, batch).time_s, measured_s, 1e-8)
    return with_start(start_s)


def _solved(rising: Callable[[float], float], target: float, low: float) -> float:
    """Return where a rising function reaches `target`, from `low` on; `low` if it is there already."""
    high = low
    while rising(high) < target:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return low


def _alone_s(shape: ModelShape, hardware: Hardware, batch: int) -> float:
    return _predicted(shape, hardware, ParallelLayout(), batch).time_s


def _predicted(shape: ModelShape, hardware: Hardware, layout: ParallelLayout, batch: int) -> Roofline:
    ep = layout.size if layout.experts_by is ExpertsBy.EXPERT else 1
    parallel = Parallelism(layout.attention_tp, layout.num_lanes, ep)
    return predict_step(shape, hardware, StepLoad.decode(batch, batch * (_CONTEXT + _WARM + _STEPS / 2)), parallel)
