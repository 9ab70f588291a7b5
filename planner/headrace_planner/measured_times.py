"""Step times from measured tables: NVIDIA's H200 kernel timings in the CSV format of aiconfigurator, read at run time.

The tables time one layer's MLA, routed experts and their exchange for DeepSeek-V3's shapes; what they do not have
(projections, shared experts, norms, vocabulary) comes from the roofline. Attention is data parallel: every GPU has all
heads of its own sequences.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from headrace_core.errors import InvalidRequestError
from headrace_core.roofline.model_shape import MlaShape

from headrace_planner.sim_roofline import Machine, roofline_times
from headrace_planner.step_times import Curve, TableStepTimes, chunk_pairs

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class KernelTables:
    """One layer on one H200; seconds. `experts` by tokens of the whole group, `exchange` by tokens of one GPU."""

    decode_rows: tuple[float, ...]
    decode_attention: tuple[Curve, ...]
    """For each of `decode_rows`: seconds by context."""
    prompt_attention: Curve
    """Seconds by query-key pairs."""
    experts: Curve
    exchange: Curve


def load_tables(folder: Path, *, ep: int, num_heads: int = 128, distribution: str = "uniform") -> KernelTables:
    """Read `mla_ms.csv`, `wideep_moe_ms.csv` and `deepep_ll_us.csv`.

    Args:
        folder: where they are.
        ep: GPUs of the expert-parallel group: 4, 8, 16, 32, 64, 128 or 256.
        num_heads: query heads: 16, 64 or 128.
        distribution: of experts' load: `uniform`, `power_law_0.6` ... `power_law_1.2`.

    Raises:
        InvalidRequestError: BAD_TABLES, naming what is missing.
    """
    mla = [
        row
        for row in _read(folder / "mla_ms.csv")
        if row["src"] == "sglang0.5.14" and row["kv_cache_dtype"] == "bfloat16" and row["num_heads"] == str(num_heads)
    ]
    decode = [row for row in mla if row["table"] == "generation_mla_perf"]
    rows = sorted({int(row["batch_size"]) for row in decode})
    curves = [
        _curve(
            (row for row in decode if int(row["batch_size"]) == batch),
            lambda row: float(row["step"]) + float(row["isl"]),
            lambda row: float(row["latency"]) / 1e3,
        )
        for batch in rows
    ]
    prefill = [row for row in mla if row["table"] == "context_mla_perf" and row["batch_size"] == "1"]
    moe = [
        row
        for row in _read(folder / "wideep_moe_ms.csv")
        if row["table"] == "wideep_generation_moe_perf"
        and row["moe_ep_size"] == str(ep)
        and row["distribution"] == distribution
    ]
    exchange = [
        row
        for row in _read(folder / "deepep_ll_us.csv")
        if row["num_experts"] == "256" and int(row["node_num"]) == min(8, max(1, ep // 8))
    ]
    if not (decode and prefill and moe and exchange):
        text = f"{folder} has no rows for EP{ep}, {num_heads} heads, {distribution}"
        raise InvalidRequestError("BAD_TABLES", text)
    return KernelTables(
        tuple(float(batch) for batch in rows),
        tuple(curves),
        _curve(prefill, lambda row: chunk_pairs(0, int(row["isl"])), lambda row: float(row["latency"]) / 1e3),
        _curve(moe, lambda row: float(row["num_tokens"]), lambda row: float(row["latency"]) / 1e3),
        _curve(
            exchange,
            lambda row: float(row["num_token"]),
            lambda row: (float(row["combine_avg_t_us"]) + float(row["dispatch_avg_t_us"])) / 1e6,
        ),
    )


def measured_times(
    machine: Machine, tables: KernelTables, *, max_rows: int, max_tokens: int, max_context: int = 131072
) -> TableStepTimes:
    """Return step times of a worker of `machine.parallel.ep` GPUs with data-parallel attention.

    Raises:
        InvalidRequestError: BAD_TABLES, the model's attention is sparse, which is not in them.
    """
    if isinstance(machine.shape.attention, MlaShape) and machine.shape.attention.indexer:
        text = f"tables are of attention over all tokens, {machine.shape.name}'s is over chosen ones; leave them out"
        raise InvalidRequestError("BAD_TABLES", text)
    gpus = machine.parallel.num_gpus
    layers, moe_layers = machine.shape.num_layers, machine.shape.num_moe_layers
    floor = roofline_times(machine, max_rows=max_rows, max_tokens=max_tokens, max_context=max_context)

    def routed_s(tokens: float) -> float:
        return moe_layers * (tables.experts(tokens) + tables.exchange(tokens / gpus))

    scaled = [Curve(curve.xs, [layers * y for y in curve.ys]) for curve in tables.decode_attention]
    return replace(
        floor,
        moe=Curve.sample(routed_s, floor.moe.xs),
        decode_rows=[rows * gpus for rows in tables.decode_rows],
        decode_attention=scaled,
        # A prompt's chunks are on one GPU each: the worker's GPUs compute different ones.
        prompt_attention=Curve(
            [pairs * gpus for pairs in tables.prompt_attention.xs], [layers * y for y in tables.prompt_attention.ys]
        ),
    )


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        raise InvalidRequestError("BAD_TABLES", f"{path} is no file; give the folder with aiconfigurator's CSV tables")
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def _curve(rows: Iterable[Row], x: Callable[[Row], float], y: Callable[[Row], float]) -> Curve:
    """Return the curve through the rows; where two have the same x, the faster one."""
    points: dict[float, float] = {}
    for row in rows:
        at, value = x(row), y(row)
        points[at] = min(value, points.get(at, value))
    xs = sorted(points)
    return Curve(xs, [points[at] for at in xs])
