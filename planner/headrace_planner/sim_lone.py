"""What a request takes when it has a cluster to itself: no number of workers makes it faster."""

from __future__ import annotations

import numpy as np
from headrace_core.request_trace import Workload, prefix_hits
from numpy.typing import NDArray

from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.sim_result import Slo
from headrace_planner.step_times import StepShape


def is_out_of_reach(config: SimConfig, workload: Workload, slo: Slo) -> NDArray[np.bool_]:
    """Return, for each request, whether it misses `slo` even alone on idle workers with every shared prefix cached.

    A lower bound: caches that hold less, or steps that others share, make more requests miss.
    """
    assert config.prefill is not None, "a disaggregated cluster has prefill workers"
    assert config.decode is not None, "a disaggregated cluster has decode workers"
    out = np.zeros(len(workload), dtype=bool)
    lengths = (workload.num_prompt.tolist(), workload.num_output.tolist(), prefix_hits(workload).tolist())
    for index, (num_prompt, num_output, num_cached) in enumerate(zip(*lengths, strict=True)):
        out[index] = (
            lone_ttft_s(config.prefill, config.wire, num_prompt, num_cached) > slo.ttft_s
            or lone_tpot_s(config.decode, num_prompt, num_output) > slo.itl_s
        )
    return out


def lone_ttft_s(spec: WorkerSpec, wire: Wire, num_prompt: int, num_cached: int = 0) -> float:
    """Return seconds to the first token of a prompt on an idle prefill worker; at least one token is computed."""
    seconds = wire.admit_s + 2 * wire.rpc_s
    start = min(num_cached, num_prompt - 1)
    while start < num_prompt:
        count = min(spec.max_step_tokens, num_prompt - start)
        seconds += spec.times.step_s(
            StepShape(prompt_tokens=count, prompt_pairs=spec.times.pairs_of(start, count), num_chunks=1)
        )
        start += count
    return seconds


def lone_tpot_s(spec: WorkerSpec, num_prompt: int, num_output: int) -> float:
    """Return seconds per output token after the first on an idle decode worker: the step at the mean context."""
    return spec.times.step_s(StepShape(1, num_prompt + num_output / 2)) if num_output > 1 else 0.0
