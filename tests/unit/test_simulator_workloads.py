"""The four workloads at full size: as a bench would ask them, and never faster than the roofline."""

from __future__ import annotations

import pytest
from headrace_client.bench.asked import Dataset
from headrace_core.roofline.operations import StepLoad
from headrace_planner.sim_workloads import (
    AT_ONCE,
    MODELS,
    SPREAD,
    WORKLOADS,
    Simulated,
    cluster_of,
    machine_of,
    rate_of,
    workload_of,
)  # fmt: skip
from headrace_planner.simulator import simulate


def test_what_is_simulated_is_what_a_bench_would_ask():
    for name in WORKLOADS:
        workload, sessions = workload_of(name, 5.0, 50), Dataset(name, num_requests=50, spread=SPREAD).sessions()
        turns = [session.turns[0] for session in sessions]
        assert workload.num_prompt.tolist() == [turn.num_new_tokens for turn in turns]
        assert workload.num_output.tolist() == [turn.num_output for turn in turns]
    assert not workload_of(AT_ONCE, rate_of("deepseek-v3", AT_ONCE)).arrival_s.any()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_nothing_simulated_is_faster_than_the_roofline(model, name):
    rate = rate_of(model, name)
    cell = Simulated(model, name, rate, simulate(cluster_of(model), workload_of(name, rate, 256)))
    machine, recorder, workload = machine_of(model), cell.result.recorder, cell.result.workload
    gaps_s, _ = recorder.gaps()
    for tokens, ttft_s in zip(workload.num_prompt, cell.result.ttft_s, strict=True):
        # 4 %: what the simulator's table of step times is off by (tests/unit/test_simulator_attention.py).
        assert ttft_s > 0.96 * machine.step(StepLoad.prefill(int(tokens), 0, batch=1)).time_s
    least_context = int(workload.num_prompt.min())
    assert gaps_s.min() > machine.step(StepLoad.decode(1, least_context)).time_s * 0.99
    assert cell.figures["mean_itl_ms"] > 1e3 * cell.step().time_s * 0.99
    assert cell.result.num_done == 256
