"""The field's four workloads at their full size, simulated: what `headrace bench` would print of two nodes.

Lengths and arrivals are as `headrace bench --dataset NAME --range-ratio 0.5 --num-requests 4096` has them, at a rate.
One prefill and one decode node of eight H200, attention in eight data-parallel groups and experts on eight ranks,
weights in FP8, step times from the roofline: a bound, which no machine reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from headrace_client.bench.datasets import PRESETS, Shape, independent
from headrace_client.bench.figures import Figures
from headrace_client.bench.load import Arrivals
from headrace_core.request_trace import Workload
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.roofline import Roofline
from headrace_core.roofline.step_load import StepLoad

from headrace_planner.plots import Figure, Line
from headrace_planner.sim_attention import attention_machine
from headrace_planner.sim_capacity import wire_of
from headrace_planner.sim_config import SimConfig
from headrace_planner.sim_figures import figures_of
from headrace_planner.sim_result import SimResult, Slo
from headrace_planner.sim_roofline import Machine
from headrace_planner.sim_studies import Study, expected_rate, spec
from headrace_planner.simulator import simulate
from headrace_planner.workload import Lengths, block_tokens_of

MODELS = ("deepseek-v3", "mixtral-8x7b")
WORKLOADS = ("conversation", "conversation-large-batch", "reasoning", "summarization")
AT_ONCE = "conversation-large-batch"
"""Its requests come all at once, as its name says; the others' at a rate."""
SLO = Slo(ttft_s=2.0, itl_s=0.05)
SPREAD = 0.5
_NUM_REQUESTS = 4096
_SHARE = 0.7
"""Of the rate that the slower of both nodes can do within the objective, by the planner's arithmetic."""
_MOST_ROWS = 4096
_PARALLEL = Parallelism(tp=1, dp=8, ep=8)


@dataclass(frozen=True, slots=True)
class Simulated:
    """One workload of one model. `rate` is requests per second, infinite: all at once."""

    model: str
    workload: str
    rate: float
    result: SimResult

    @property
    def figures(self) -> Figures:
        """What clients saw, by the names of `headrace bench`."""
        return figures_of(self.result, SLO)

    @property
    def mean_rows(self) -> float:
        """Sequences that decoded at once on average while any did: tokens a second times the mean gap."""
        figures = self.figures
        busy = figures["duration"] * self.result.utilisation("decode")
        return figures["total_output_tokens"] / busy * figures["mean_itl_ms"] / 1e3

    def step(self) -> Roofline:
        """Return the roofline of a decode step of so many sequences, half of their answers done."""
        workload, rows = self.result.workload, max(1, round(self.mean_rows))
        context = float(workload.num_prompt.mean() + workload.num_output.mean() / 2)
        return machine_of(self.model).step(StepLoad.decode(rows, rows * context))


@cache
def machine_of(model: str) -> Machine:
    """Return a node of eight H200 with `model`."""
    return attention_machine(model, _PARALLEL)


@cache
def cluster_of(model: str) -> SimConfig:
    """Return one prefill and one decode node."""
    machine = machine_of(model)
    worker = spec(machine, max_rows=_MOST_ROWS)
    return SimConfig(worker, worker, None, 1, 1, wire=wire_of(machine), fidelity="fast")


def rate_of(model: str, name: str) -> float:
    """Return the rate at which a workload's requests come."""
    if name == AT_ONCE:
        return float("inf")
    preset = PRESETS[name]
    lengths = Lengths(preset.num_input, preset.num_output)
    return _SHARE * expected_rate(machine_of(model), lengths, SLO, num_prefill=1, num_decode=1)


def workload_of(name: str, rate: float, num_requests: int = _NUM_REQUESTS) -> Workload:
    """Return what a bench asks of this name, at this rate."""
    preset = PRESETS[name]
    sessions = independent(Shape(num_requests, preset.num_input, preset.num_output, SPREAD))
    times_s = Arrivals(rate).times_s(sessions)
    turns = [session.turns[0] for session in sessions]
    return Workload(
        np.array(times_s),
        np.array([turn.num_new_tokens for turn in turns]),
        np.array([turn.num_output for turn in turns]),
        block_tokens=block_tokens_of(preset.num_input),
    )


def simulated(model: str, name: str) -> Simulated:
    """Return a workload's simulation on a model's two nodes; it takes seconds."""
    rate = rate_of(model, name)
    return Simulated(model, name, rate, simulate(cluster_of(model), workload_of(name, rate)))


def workloads(_: Path | None) -> Study:
    """Return what clients see of each workload, and latencies by percentile."""
    return study_of([simulated(model, name) for model in MODELS for name in WORKLOADS])


def study_of(cells: Sequence[Simulated]) -> Study:
    """Return simulated cells as figures and rows."""
    columns = ["model", "workload", "requests/s", "done/s", "output tok/s", "TTFT p50, p99", "mean ITL", "mean TPOT",
               "a step's floor", "bound by"]  # fmt: skip
    percents = list(range(1, 100, 2))
    ttft, itl = list[Line](), list[Line]()
    for cell in cells:
        style, colour = MODELS.index(cell.model), WORKLOADS.index(cell.workload)
        label = f"{cell.model}, {cell.workload}"
        firsts_ms: list[float] = (1e3 * np.nanpercentile(cell.result.ttft_s, percents)).tolist()
        gaps_ms = [1e3 * cell.result.itl_percentile(percent) for percent in percents]
        ttft.append(Line(label, percents, firsts_ms, style=style, colour=colour))
        itl.append(Line(label, percents, gaps_ms, style=style, colour=colour))
    figures = [
        Figure("TTFT, simulated on 8 + 8 H200", "percent of requests", "ms", ttft, y_log=True, legend="none"),
        Figure("ITL", "percent of tokens", "ms", itl, y_log=True, legend="beside"),
    ]
    return Study(figures, columns, [_row(cell) for cell in cells])


def bounds_of(roof: Roofline) -> str:
    """Return what bounds a step's operations, the two largest shares of its time."""
    shares = sorted(roof.shares_by_bound().items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{name} {share:.0%}" for name, share in shares)


def _row(cell: Simulated) -> list[str]:
    figures, roof = cell.figures, cell.step()
    return [
        cell.model, cell.workload, "all at once" if np.isinf(cell.rate) else f"{cell.rate:.1f}",
        f"{figures['request_throughput']:.1f}", f"{figures['output_throughput']:,.0f}",
        f"{figures['p50_ttft_ms']:.4g}, {figures['p99_ttft_ms']:.4g} ms", f"{figures['mean_itl_ms']:.1f} ms",
        f"{figures['mean_tpot_ms']:.1f} ms", f"{1e3 * roof.time_s:.1f} ms", bounds_of(roof),
    ]  # fmt: skip
