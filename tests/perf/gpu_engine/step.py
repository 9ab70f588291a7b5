"""Part `step`: the decode step of a network of random weights, captured as a worker captures it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from headrace_core.batch.step import Chunk
from headrace_core.errors import CheckpointError, StartupError
from headrace_core.model.decode_graphs import Capture, CudaGraphCapture, DecodeOutput, buckets
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.model import Model
from headrace_core.model.self_check import check_kernels
from headrace_core.roofline.hardware import Hardware, find_hardware
from headrace_core.roofline.model_shape import Dtype, ModelShape
from headrace_core.roofline.roofline import Roofline, predict_step
from headrace_core.roofline.routing import UNIFORM, expected_distinct
from headrace_core.roofline.step_load import StepLoad

from tests.perf.gpu_engine.shapes import Shape
from tests.perf.kernels.ceilings import Ceilings

_WARM_UP_STEPS = 3
_LAYER_KERNEL = "_mla_prologue_kernel"
_DTYPES = {torch.float32: Dtype.FP32, torch.bfloat16: Dtype.BF16}


class KeptCapture:
    """`Capture` that keeps what replays each bucket, by its number of rows."""

    def __init__(self, capture: Capture, max_rows: int) -> None:
        self._capture = capture
        # The largest is captured first.
        self._rows = iter(reversed(buckets(max_rows)))
        self.replays: dict[int, Callable[[], DecodeOutput]] = {}

    def __call__(self, run: Callable[[], DecodeOutput]) -> Callable[[], DecodeOutput]:
        """Capture, and keep the replay."""
        replay = self.replays[next(self._rows)] = self._capture(run)
        return replay


def measure_steps(
    model: Model,
    shape: Shape,
    ceilings: Ceilings,
    *,
    num_rounds: int,
    report: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Return what a decode step takes at every batch: ms of a replay, of the host and of both, floors, launches.

    `keep` gets what is known so far after each batch.
    """
    is_gpu = model.device == "cuda"
    found: dict[str, Any] = {
        "context": shape.context,
        "layers": model.config.num_layers,
        "weight_gb": round(model.weight_bytes / 1e9, 2),
        "kernels_check": _kernels_check(model, shape.page_size),
        "batches": {},
    }
    pages_each = -(-shape.context // shape.page_size)
    cache = KvCache(model.kv_layout(shape.page_size), max(shape.batches) * pages_each, model.device)
    for pages in cache.layers:
        pages.normal_()
    capture = KeptCapture(CudaGraphCapture() if is_gpu else lambda run: run, max(shape.batches))
    report(f"compiling and capturing steps of up to {max(shape.batches)} rows")
    model.prepare_decode(cache, max_rows=max(shape.batches), max_context_tokens=shape.context, capture=capture)
    hardware = hardware_of(ceilings)
    for batch in shape.batches:
        report(f"decode step, batch {batch}")
        chunks = decode_chunks(batch, shape.context, pages_each, model.config.vocab_size)
        row = _measure_step(model, cache, chunks, capture.replays[batch], num_rounds, report)
        distinct = row.pop("distinct_experts")
        floor = step_floor(shape.roofline_shape(), hardware, chunks, _DTYPES[model.dtype], distinct)
        row |= floor_figures(floor, row["replay_ms"]) | {"experts_hit": distinct}
        found["batches"][str(batch)] = row
        keep(found)
        report(f"batch {batch}: {json.dumps(row)}")
    model.forget_decode()
    return found


def _kernels_check(model: Model, page_size: int) -> float | str:
    """Return how far the kernels are from plain torch on this network, or why a worker would refuse to serve it."""
    try:
        return check_kernels(model, model.device, page_size)
    except (CheckpointError, StartupError) as error:
        return str(error)


def decode_chunks(batch: int, context: int, pages_each: int, vocab_size: int) -> list[Chunk]:
    """Return one token each of `batch` sequences of `context` tokens, pages of one sequence far apart."""
    generator = torch.Generator().manual_seed(batch)
    tokens: list[int] = torch.randint(vocab_size, (batch,), generator=generator).tolist()
    return [
        Chunk(key, [token], context - 1, list(range(key, batch * pages_each, batch)), is_sampled=True)
        for key, token in enumerate(tokens)
    ]


def _measure_step(
    model: Model,
    cache: KvCache,
    chunks: Sequence[Chunk],
    replay: Callable[[], DecodeOutput],
    num_rounds: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    def step() -> None:
        model.forward(chunks, cache)

    with torch.inference_mode():
        for _ in range(_WARM_UP_STEPS):
            step()
        model.take_expert_counts()
        step()
        distinct = mean_distinct(model.take_expert_counts())
        # Launching returns before the work is done: the host's own time is until then.
        host_s = [_seconds(step, model.device) for _ in range(num_rounds)]
        return {
            "replay_ms": _median_ms(replay, model.device, num_rounds),
            "host_ms": statistics.median(launched for launched, _ in host_s) * 1e3,
            "step_ms": statistics.median(done for _, done in host_s) * 1e3,
            "launches_per_layer": launches_or_none(replay, report) if model.device == "cuda" else None,
            "distinct_experts": distinct,
        }


def _seconds(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the seconds until `run` returned and until its work was done."""
    _synchronize(device)
    began_s = time.perf_counter()
    run()
    launched_s = time.perf_counter() - began_s
    _synchronize(device)
    return launched_s, time.perf_counter() - began_s


def _median_ms(replay: Callable[[], object], device: str, num_rounds: int) -> float:
    if device != "cuda":
        return statistics.median(_seconds(replay, device)[1] for _ in range(num_rounds)) * 1e3
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(num_rounds)]
    for start, end in events:
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def launches_or_none(replay: Callable[[], object], report: Callable[[str], None]) -> int | None:
    """Return `count_launches`; None, and the reason to `report`, where the profiler fails: many machines forbid it."""
    try:
        return count_launches(replay)
    except Exception as error:  # noqa: BLE001 - the times are measured; a figure beside them must not cost them
        report(f"launches are not counted: the profiler fails: {type(error).__name__}: {error}")
        return None


def count_launches(replay: Callable[[], object]) -> int | None:
    """Return the launches of a layer with experts as the GPU's profiler saw them; None if it saw none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    events: list[Any] = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    events.sort(key=_began)
    return launches_per_layer([event.name for event in events])


def _began(event: Any) -> float:
    return event.time_range.start


def launches_per_layer(names: Sequence[str]) -> int | None:
    """Return the median number of launches from one layer's prologue to the next; `names` are in the order run."""
    begins = [index for index, name in enumerate(names) if name.startswith(_LAYER_KERNEL)]
    if len(begins) < 2:
        return None
    return round(statistics.median(end - begin for begin, end in pairwise(begins)))


def mean_distinct(counts: dict[int, list[int]]) -> float:
    """Return how many experts of a layer were chosen at all, on average; `counts` are one step's, by layer."""
    return statistics.mean(sum(count > 0 for count in layer) for layer in counts.values())


def hardware_of(ceilings: Ceilings) -> Hardware:
    """Return the GPU with the ceilings that were measured on it; links are not used by one GPU."""
    rate = ceilings.tflops("bf16") * 1e12
    return replace(
        find_hardware("h200-attainable"),
        name="measured",
        flops={Dtype.BF16: rate, Dtype.FP16: rate},
        memory_bytes_per_s=ceilings.tb_s() * 1e12,
        source="measured",
    )


def step_floor(
    shape: ModelShape, hardware: Hardware, chunks: Sequence[Chunk], dtype: Dtype, experts: float | None
) -> Roofline:
    """Return the roofline of a decode step; `experts` of a layer were chosen, None: as many as are expected."""
    load = StepLoad.decode(len(chunks), sum(chunk.start + 1 for chunk in chunks))
    return predict_step(shape, hardware, load, dtype=dtype, experts_read=experts)


def floor_figures(floor: Roofline, replay_ms: float | None) -> dict[str, float | None]:
    """Return the floor of bytes alone, of each operation's slowest resource, and what part of the time the first is."""
    bytes_ms = floor.bytes / floor.hardware.memory_bytes_per_s * 1e3
    return {
        "floor_ms": bytes_ms,
        "roofline_ms": floor.time_s * 1e3,
        "fraction": None if replay_ms is None else bytes_ms / replay_ms,
    }


def unmeasured_steps(shape: Shape, ceilings: Ceilings) -> dict[str, Any]:
    """Return the figures that need no GPU: floors at `ceilings`, with as many experts as uniform routing would hit."""
    network = shape.roofline_shape()
    moe = network.moe
    assert moe, "experts are what a step's bytes are about"
    hardware = hardware_of(ceilings)
    chosen = UNIFORM.probabilities(moe.num_experts, moe.num_experts_per_token)
    pages_each = -(-shape.context // shape.page_size)
    batches: dict[str, Any] = {}
    for batch in shape.batches:
        chunks = decode_chunks(batch, shape.context, pages_each, network.vocab_size)
        floor = step_floor(network, hardware, chunks, Dtype.BF16, None)
        batches[str(batch)] = floor_figures(floor, None) | {"experts_hit": expected_distinct(chosen, batch)}
    return {
        "GPU": "not measured: floors of an H200 at assumed ceilings",
        "context": shape.context,
        "layers": network.num_layers,
        "batches": batches,
    }
