"""TP against DP attention, by what clients see: TTFT and E2E over concurrency, for each of the field's workloads.

Prefill and decode divide attention the same way, and experts over all eight GPUs either way. Step times are the
roofline's, by which a step waits for the lane that has one sequence more (`step_times.TableStepTimes`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import find_hardware
from headrace_core.roofline.model_shape import MODELS, Dtype

from headrace_planner.plots import Figure, Line
from headrace_planner.sim_capacity import wire_of
from headrace_planner.sim_config import SimConfig
from headrace_planner.sim_roofline import Machine
from headrace_planner.sim_studies import Study, spec
from headrace_planner.simulator import simulate
from headrace_planner.workload import Lengths, closed_loop

_GPUS = 8
_MODELS = ("deepseek-v3", "mixtral-8x7b")
_WORKLOADS = {
    "conversation": (Lengths(256, 256, 0.0, 0.5), 4096),
    "reasoning": (Lengths(256, 4096, 0.0, 0.5), 1024),
    "summarization": (Lengths(4096, 256, 0.0, 0.5), 1024),
}
"""Lengths, and the most requests in flight; conversation from 1,024 on is the field's "conversation, large batch".
Outputs are spread, or all would end and begin at once."""
_PER_CLIENT = 2
_LEAST_REQUESTS = 24
_MEASURED = Path("build/bench/parallel.json")
_PAIR = ("tp2 × ep2", "dp2 × ep2")


@dataclass(frozen=True, slots=True)
class Served:
    """What clients saw of one workload, by requests in flight: medians, seconds; first TP, then DP."""

    concurrencies: Sequence[int]
    ttft_s: tuple[list[float], list[float]]
    e2e_s: tuple[list[float], list[float]]


def attention(_: Path | None) -> Study:
    """Return where DP attention overtakes TP, for each model and workload."""
    served = {(model, name): _served(model, name) for model in _MODELS for name in _WORKLOADS}
    columns = ["model", "workload", "in flight", "TTFT TP8", "DP8", "E2E TP8", "DP8", "DP ahead from: E2E", "TTFT"]
    rows = [row for (model, name), found in served.items() for row in _rows(model, name, found)]
    figures = [_ratios(f"{what} of TP8 over DP8, 8 H200 a side, simulated", served, what) for what in ("E2E", "TTFT")]
    measured = _measured_figure(_MEASURED)
    if measured:
        figures.append(measured)
    else:
        rows.append([f"no measured points: make bench-parallel writes {_MEASURED}", *[""] * (len(columns) - 1)])
    return Study(figures, columns, rows)


def attention_machine(model: str, parallel: Parallelism) -> Machine:
    """Return `model` in FP8 on H200s, so divided."""
    return Machine(MODELS[model], find_hardware("h200-attainable"), parallel, Dtype.FP8)


def crossing(concurrencies: Sequence[int], first: Sequence[float], second: Sequence[float]) -> int | None:
    """Return the concurrency from which on `second` is less than `first`; None: not at the end of the grid."""
    found = None
    for concurrency, one, other in zip(reversed(concurrencies), reversed(first), reversed(second), strict=True):
        if other >= one:
            break
        found = concurrency
    return found


def _served(model: str, name: str) -> Served:
    lengths, most = _WORKLOADS[name]
    concurrencies = [1 << power for power in range(most.bit_length())]
    found = Served(concurrencies, ([], []), ([], []))
    for side, parallel in enumerate((Parallelism(_GPUS, 1, _GPUS), Parallelism(1, _GPUS, _GPUS))):
        machine = attention_machine(model, parallel)
        worker = spec(machine, max_rows=most)
        config = SimConfig(worker, worker, None, 1, 1, wire=wire_of(machine), fidelity="fast")
        for concurrency in concurrencies:
            count = max(_LEAST_REQUESTS, _PER_CLIENT * concurrency)
            result = simulate(config, closed_loop(lengths, concurrency=concurrency, num_requests=count))
            # Without the first of each client, which all come at once.
            found.ttft_s[side].append(float(np.nanmedian(result.ttft_s[concurrency:])))
            found.e2e_s[side].append(float(np.nanmedian(result.e2e_s[concurrency:])))
    return found


def _rows(model: str, name: str, found: Served) -> Iterator[list[str]]:
    """Yield the ends of the grid and its middle; with the first, from where on DP is ahead."""
    last = len(found.concurrencies) - 1
    for at in (0, last // 2, last):
        times = [f"{1e3 * side[at]:.4g} ms" for sides in (found.ttft_s, found.e2e_s) for side in sides]
        crossings = [crossing(found.concurrencies, *sides) for sides in (found.e2e_s, found.ttft_s)]
        told = [f"{each or 'never here'}" if at == 0 else "" for each in crossings]
        yield [model, name, str(found.concurrencies[at]), *times, *told]


def _ratios(title: str, served: dict[tuple[str, str], Served], what: str) -> Figure:
    lines: list[Line] = []
    for (model, name), found in served.items():
        tp, dp = found.e2e_s if what == "E2E" else found.ttft_s
        ratios = [one / other for one, other in zip(tp, dp, strict=True)]
        style, colour = _MODELS.index(model), list(_WORKLOADS).index(name)
        lines.append(Line(f"{model}, {name}", found.concurrencies, ratios, style=style, colour=colour))
    return Figure(title, "requests in flight", "above 1 DP is faster", lines, x_log=True, y_log=True)


def _measured_figure(path: Path) -> Figure | None:
    """Return the demo model's steps on two ranks, measured by `make bench-parallel` and by the same formulas."""
    if not path.is_file():
        return None
    rows: list[dict[str, Any]] = json.loads(path.read_text()).get("steps", {}).get("layouts", [])
    lines: list[Line] = []
    for colour, name in enumerate(_PAIR):
        of_name = sorted((row for row in rows if name in row["names"]), key=lambda row: row["batch"])
        batches = [row["batch"] for row in of_name]
        for style, (key, how) in enumerate((("step_us", "measured"), ("step_us_predicted", "by formula"))):
            lines.append(Line(f"{name}, {how}", batches, [row[key] for row in of_name], style=style, colour=colour))
    title = "demo model, 2 ranks on CPU cores: a decode step's critical path"
    return Figure(title, "sequences in the batch", "microseconds", lines, x_log=True) if rows else None
