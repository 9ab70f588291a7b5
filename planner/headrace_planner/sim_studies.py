"""What the docs show, each made by one command: `headrace simulate --study NAME --plot FILE`.

Every study returns the figures of one file and a table of the numbers behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from headrace_core.errors import InvalidRequestError
from headrace_core.expert_placement import balanced, in_order
from headrace_core.request_trace import load_trace
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import find_hardware
from headrace_core.roofline.model_shape import MODELS, Dtype
from headrace_core.roofline.routing import Routing

from headrace_planner.capacity import Demand, decode_options, kv_tokens, prefill_options
from headrace_planner.plots import Figure, Line
from headrace_planner.sim_capacity import wire_of, worker_spec
from headrace_planner.sim_config import SimConfig, WorkerSpec
from headrace_planner.sim_result import SimResult, Slo
from headrace_planner.sim_roofline import Machine, roofline_times
from headrace_planner.sim_tradeoffs import crossover, kv_memory
from headrace_planner.simulator import simulate
from headrace_planner.step_times import LinearStepTimes, TableStepTimes
from headrace_planner.workload import Lengths, closed_loop, poisson

_PROMPT_STEP = 65_536
"""Prompt tokens of a step of eight GPUs."""


@dataclass(frozen=True, slots=True)
class Study:
    """Figures of one file, and rows of numbers."""

    figures: Sequence[Figure]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def node(parallel: Parallelism, *, hardware: str = "h200-attainable") -> Machine:
    """Return DeepSeek-V3 in FP8 on H200s."""
    return Machine(MODELS["deepseek-v3"], find_hardware(hardware), parallel, Dtype.FP8)


def spec(machine: Machine, *, step_tokens: int = _PROMPT_STEP, max_rows: int = 2048) -> WorkerSpec:
    """Return a worker of `machine`."""
    return worker_spec(
        machine, kv_tokens=kv_tokens(machine), max_rows=max_rows, step_tokens=step_tokens, max_context=131_072
    )


def dp_attention(_: Path | None) -> Study:
    """DP attention against TP attention, on one node, closed loop: simulated output rate over concurrency."""
    machines = [node(Parallelism(8, 1, 8)), node(Parallelism(1, 8, 8))]
    names = ("TP8", "DP8")
    concurrencies = [8, 16, 32, 64, 128, 256, 512, 1024]
    lines: list[Line] = []
    for machine, name in zip(machines, names, strict=True):
        # Prompts come from a prefill side that is never the limit: only decode differs.
        config = SimConfig(
            spec(node(Parallelism(1, 8, 8))), spec(machine), None, 4, 1, wire=wire_of(machine), fidelity="fast"
        )
        rates = [_closed_rate(config, Lengths(2048, 512), concurrency) for concurrency in concurrencies]
        lines.append(Line(name, concurrencies, [rate / 8 for rate in rates]))
    cross = crossover(*machines, context=2304)
    memory = kv_memory([machines[0], replace(machines[0], shape=MODELS["mixtral-8x7b"])], context=4096)
    speed = Figure(
        "DeepSeek-V3 on 8 H200, 2048/512, simulated", "requests in flight", "output tokens/s per GPU", lines, True
    )
    rows = [
        [str(c), f"{lines[0].ys[i]:.0f}", f"{lines[1].ys[i]:.0f}", f"{lines[1].ys[i] / lines[0].ys[i]:.2f}"]
        for i, c in enumerate(concurrencies)
    ]
    rows.append([f"step times cross at batch {cross.batch}", "", "", ""])
    return Study([memory, speed], ["in flight", "TP8 tok/s/GPU", "DP8 tok/s/GPU", "DP8 / TP8"], rows)


def experts(_: Path | None) -> Study:
    """Skewed experts and EPLB: decode and prefill rates of an EP32 group over the Zipf exponent."""
    machine = node(Parallelism(1, 32, 32))
    moe = machine.shape.moe
    assert moe is not None, "DeepSeek-V3 has experts"
    count, top_k, ep = moe.num_experts, moe.num_experts_per_token, 32
    exponents = [0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8]
    names = ("as numbered", "balanced", "balanced, 32 replicas")
    imbalances: list[list[float]] = [[], [], []]
    for exponent in exponents:
        loads = Routing(zipf=exponent).probabilities(count, top_k)
        placed = (in_order(count, ep), balanced(loads, ep), balanced(loads, ep, redundant=32))
        for values, placement in zip(imbalances, placed, strict=True):
            values.append(placement.imbalance(loads))
    table = roofline_times(machine, max_rows=16_384, max_tokens=16_384)
    # Placements that come to the same, as all do when load is even, are simulated once.
    rate_of = {value: _skewed_rate(machine, table, value) for value in {round(v, 3) for vs in imbalances for v in vs}}
    rates = [[rate_of[round(value, 3)] for value in values] for values in imbalances]
    figures = [
        Figure("Load of the busiest of 32 ranks", "Zipf exponent of expert popularity", "busiest / mean",
               [Line(name, exponents, ys) for name, ys in zip(names, imbalances, strict=True)]),
        Figure("DeepSeek-V3, EP32, 4096 rows of 2048/128, simulated", "Zipf exponent of expert popularity",
               "output tokens/s per GPU", [Line(name, exponents, ys) for name, ys in zip(names, rates, strict=True)]),
    ]  # fmt: skip
    rows = [
        [f"{exponent:.1f}", *(f"{values[i]:.2f}" for values in imbalances), *(f"{ys[i]:.0f}" for ys in rates),
         f"{1 - rates[0][i] / rates[0][0]:.0%}", f"{1 - rates[2][i] / rates[0][0]:.0%}"]
        for i, exponent in enumerate(exponents)
    ]  # fmt: skip
    columns = ["Zipf", *(f"max/mean {n}" for n in names), *(f"tok/s/GPU {n}" for n in names), "lost", "lost with EPLB"]
    return Study(figures, columns, rows)


def disaggregation(trace: Path | None) -> Study:
    """Four nodes, disaggregated or colocated: goodput over the arrival rate, on a recorded trace."""
    if trace is None:
        raise InvalidRequestError("BAD_TRACE", "this study replays a trace: give --trace conversation_trace.jsonl")
    recorded = load_trace(trace).head(3000)
    slo = Slo(ttft_s=10.0, itl_s=0.04)
    machine = node(Parallelism(1, 8, 8))
    wire = wire_of(machine)
    whole, one = spec(machine), spec(node(Parallelism(8, 1, 8)))
    chunked, one_chunked = (spec(node(way), step_tokens=8192) for way in (Parallelism(1, 8, 8), Parallelism(8, 1, 8)))
    # Prompts by TP8 or DP8; what only decodes is DP8, whose caches are not copied.
    clusters = {
        "3 prefill TP8 + 1 decode": SimConfig(one, whole, None, 3, 1, wire=wire, fidelity="fast"),
        "2 prefill TP8 + 2 decode": SimConfig(one, whole, None, 2, 2, wire=wire, fidelity="fast"),
        "3 prefill DP8 + 1 decode": SimConfig(whole, whole, None, 3, 1, wire=wire, fidelity="fast"),
        "4 colocated TP8, whole prompts": SimConfig(None, None, one, num_both=4, wire=wire, fidelity="fast"),
        "4 colocated TP8, 8k chunks": SimConfig(None, None, one_chunked, num_both=4, wire=wire, fidelity="fast"),
        "4 colocated DP8, whole prompts": SimConfig(None, None, whole, num_both=4, wire=wire, fidelity="fast"),
        "4 colocated DP8, 8k chunks": SimConfig(None, None, chunked, num_both=4, wire=wire, fidelity="fast"),
    }
    scales = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    rates = [recorded.rate * scale for scale in scales]
    lines: list[Line] = []
    tails: list[Line] = []
    rows: list[list[str]] = []
    for name, config in clusters.items():
        results = [simulate(config, recorded.scaled(scale)) for scale in scales]
        lines.append(Line(name, rates, [result.goodput(slo) for result in results]))
        tails.append(Line(name, rates, [1e3 * float(np.nanpercentile(result.tpot_s, 99)) for result in results]))
        rows.append([name, *(f"{result.attainment(slo):.0%}" for result in results)])
    title = f"TTFT <= {slo.ttft_s:g} s and TPOT <= {slo.itl_s * 1e3:g} ms, 4 nodes of 8 H200"
    figures = [
        Figure(title, "requests/s", "goodput, requests/s", lines),
        Figure("what decoding costs", "requests/s", "TPOT p99, ms", tails, y_log=True),
    ]
    return Study(figures, ["met both objectives at requests/s", *(f"{rate:.1f}" for rate in rates)], rows)


def ratio(_: Path | None) -> Study:
    """How many of eight nodes should prefill: the highest rate that meets the objective, over the split."""
    slo = Slo(ttft_s=2.0, itl_s=0.05)
    machine = node(Parallelism(1, 8, 8))
    worker = spec(machine)
    lines: list[Line] = []
    rows: list[list[str]] = []
    for lengths, splits in ((Lengths(4096, 256), (1, 2, 3, 4, 5, 6, 7)), (Lengths(256, 4096), (1, 2, 4, 6))):
        rates: list[float] = []
        for p in splits:
            config = SimConfig(worker, worker, None, p, 8 - p, wire=wire_of(machine), fidelity="fast")
            guess = expected_rate(machine, lengths, slo, num_prefill=p, num_decode=8 - p)
            rates.append(_best_rate(config, lengths, slo, guess))
        name = f"{lengths.num_prompt:.0f}/{lengths.num_output:.0f}"
        lines.append(Line(name, splits, rates))
        best = splits[int(np.argmax(rates))]
        rows.append([name, ", ".join(f"{p}:{8 - p} {rate:.1f}" for p, rate in zip(splits, rates, strict=True)),
                     f"{best}:{8 - best}"])  # fmt: skip
    figures = [
        Figure(f"{line.label}: eight nodes of 8 H200", "prefill nodes of 8", "requests/s within the objective", [line])
        for line in lines
    ]
    return Study(figures, ["in/out", "requests/s at prefill:decode", "best"], rows)


def _closed_rate(config: SimConfig, lengths: Lengths, concurrency: int, *, per_client: int = 4) -> float:
    """Return output tokens per second with `concurrency` requests in flight, start and end left out."""
    workload = closed_loop(lengths, concurrency=concurrency, num_requests=per_client * concurrency)
    return steady_rate(simulate(config, workload))


def steady_rate(result: SimResult) -> float:
    """Return output tokens per second between the first and the last quarter of requests' ends."""
    order = np.sort(result.recorder.last_s)
    low, high = len(order) // 4, 3 * len(order) // 4
    tokens = float(result.workload.num_output.mean()) * (high - low)
    return tokens / max(float(order[high] - order[low]), 1e-9)


def _skewed_rate(machine: Machine, table: TableStepTimes, imbalance: float) -> float:
    """Return output tokens per second and GPU of a decode worker that is kept full."""
    times = table.with_imbalance(imbalance)
    pages = kv_tokens(machine) // 64
    decode = WorkerSpec(times, num_pages=pages, max_step_tokens=16_384, max_step_sequences=16_384, num_gpus=32)
    # One prefill worker that is never the limit: placing prompts on many took most of the study's time.
    prefill = WorkerSpec(
        LinearStepTimes(fixed_s=1e-3, prompt_token_s=1e-8), num_pages=1 << 20, max_step_tokens=1 << 21,
        max_step_sequences=1 << 14,
    )  # fmt: skip
    config = SimConfig(prefill, decode, None, 1, 1, wire=wire_of(machine), fidelity="fast")
    return _closed_rate(config, Lengths(2048, 128), 4096, per_client=2) / machine.parallel.num_gpus


def expected_rate(machine: Machine, lengths: Lengths, slo: Slo, *, num_prefill: int, num_decode: int) -> float:
    """Return what the planner's own arithmetic expects of a split: the slower side's best rate."""
    demand = Demand(lengths.num_prompt, lengths.num_output, 1.0)
    decode = decode_options([machine], demand, slo)[0]
    prefill = prefill_options([machine], demand, slo, link_bytes_per_s=1e12)[0]
    return min(num_prefill / prefill.service_s, num_decode * decode.tokens_per_s / lengths.num_output)


def _best_rate(config: SimConfig, lengths: Lengths, slo: Slo, guess: float) -> float:
    """Return the highest rate at which 95 % of requests meet the objective, to about 5 %."""
    low, high = 0.0, guess
    while _meets(config, lengths, slo, high):
        low, high = high, 1.4 * high
    if not low:
        low = 0.6 * guess
        while not _meets(config, lengths, slo, low):
            low, high = 0.6 * low, low
    while high - low > 0.05 * high:
        middle = (low + high) / 2
        if _meets(config, lengths, slo, middle):
            low = middle
        else:
            high = middle
    return low


def _meets(config: SimConfig, lengths: Lengths, slo: Slo, rate: float) -> bool:
    # Long enough for decode batches to fill twice over.
    seconds = 20 + 2 * lengths.num_output * slo.itl_s
    workload = poisson(lengths, rate=rate, num_requests=int(min(8000, max(300, rate * seconds))))
    return simulate(config, workload).attainment(slo) >= 0.95
