"""TP against DP attention, TP against EP: memory and speed over concurrency, as lines to plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.memory import kv_bytes_per_gpu
from headrace_core.roofline.model_shape import Dtype

from headrace_planner.capacity import kv_tokens
from headrace_planner.plots import Figure, Line
from headrace_planner.sim_roofline import Machine

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Crossover:
    """The batch from which `better` decodes faster than `worse`; None: nowhere on the grid."""

    better: str
    worse: str
    batch: int | None


def batches(most: int) -> list[int]:
    """Return powers of two from 8 to `most`."""
    grid, batch = [], 8
    while batch <= most:
        grid.append(batch)
        batch *= 2
    return grid


def kv_memory(machines: Sequence[Machine], *, context: int, most: int = 1024) -> Figure:
    """Return the cache per GPU over the batch, TP and DP, of several models."""
    lines: list[Line] = []
    for colour, machine in enumerate(machines):
        gpus = machine.parallel.num_gpus
        for style, parallel in enumerate((Parallelism(gpus, 1, 1), Parallelism(1, gpus, 1))):
            name = f"{machine.shape.name} {'TP' if style == 0 else 'DP'}{gpus}"
            dtype = machine.kv_dtype or Dtype.BF16
            ys = [kv_bytes_per_gpu(machine.shape, parallel, b * context, dtype) / _GIB for b in batches(most)]
            lines.append(Line(name, batches(most), ys, style=style, colour=colour))
    return Figure(f"KV cache per GPU, {context} tokens each", "sequences", "GiB per GPU", lines, x_log=True, y_log=True)


def decode_speed(machines: Sequence[Machine], *, context: int, most: int = 4096, title: str) -> Figure:
    """Return output tokens per second and GPU over the batch; a line ends where its caches are full."""
    lines: list[Line] = []
    for machine in machines:
        fit = [b for b in batches(most) if b * context <= kv_tokens(machine) and b >= machine.parallel.dp]
        gpus = machine.parallel.num_gpus
        ys = [b / machine.decode_s(b, context) / gpus for b in fit]
        lines.append(Line(str(machine.parallel), fit, ys))
    return Figure(title, "sequences in the batch", "output tokens/s per GPU", lines, x_log=True)


def crossover(first: Machine, second: Machine, *, context: int, most: int = 4096) -> Crossover:
    """Return from which batch `second` is faster; a batch that does not fit is infinitely slow."""
    for batch in range(1, most + 1):
        if _seconds(second, batch, context) < _seconds(first, batch, context):
            return Crossover(str(second.parallel), str(first.parallel), batch)
    return Crossover(str(second.parallel), str(first.parallel), None)


def _seconds(machine: Machine, batch: int, context: int) -> float:
    return machine.decode_s(batch, context) if batch * context <= kv_tokens(machine) else float("inf")
