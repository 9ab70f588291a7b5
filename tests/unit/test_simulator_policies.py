"""The router's policies under the simulated clock: shares of clients, early rejection, and every one by its name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from headrace_core.request_trace import Workload
from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.sim_result import SimResult, Slo
from headrace_planner.simulator import _Simulation
from headrace_planner.step_times import LinearStepTimes
from headrace_planner.workload import Lengths, Phase, changing, poisson
from headrace_router.placement.preferences import PREFERENCES

WORKER = WorkerSpec(LinearStepTimes(fixed_s=0.01, row_s=2e-4, prompt_token_s=1e-4), num_pages=2000, max_step_tokens=512)
PAIR = SimConfig(WORKER, WORKER, None, 1, 1, wire=Wire(rpc_s=1e-3), fidelity="exact")


def run(config: SimConfig, workload: Workload) -> SimResult:
    simulation = _Simulation(config, workload)
    simulation.run()
    simulation.check_integrity()
    return simulation.result(0.0)


def crowd(*, has_clients: bool) -> tuple[Workload, np.ndarray]:
    """One client asks 60 times at once, another one once a second. Return whose each request is as well."""
    arrivals = np.concatenate([np.zeros(60), np.arange(1, 6)])
    order = np.argsort(arrivals, kind="stable")
    whose = np.array([0] * 60 + [1] * 5)[order]
    clients = whose.tolist() if has_clients else None
    return Workload(arrivals[order], np.full(65, 1000), np.full(65, 4), clients=clients), whose


def test_a_client_that_asks_now_and_then_does_not_wait_for_anothers_many():
    workload, whose = crowd(has_clients=True)
    apart = run(PAIR, workload)
    alike = run(PAIR, crowd(has_clients=False)[0])
    assert apart.num_done == alike.num_done == 65
    assert apart.ttft_s[whose == 1].max() < 0.5
    assert alike.ttft_s[whose == 1].min() > 1.5, "of one client's requests the first that came is the first"


def test_early_rejection_keeps_the_target_of_those_it_accepts_at_three_times_the_capacity():
    lengths = Lengths(1000, 8)  # 8 a second are what a prefill worker computes
    workload, slo = poisson(lengths, rate=24.0, num_requests=240, seed=1), Slo(ttft_s=1.0)
    queued = run(PAIR, workload)
    refusing = run(replace(PAIR, ttft_target_s=1.0), workload)
    assert queued.num_done == 240
    assert refusing.num_done + refusing.recorder.num_refused == 240
    done = refusing.recorder.is_done
    assert (refusing.ttft_s[done] <= 1.0).mean() >= 0.95
    assert refusing.num_done >= 60, "as much as there is capacity for is accepted"
    assert refusing.attainment(slo) > 3 * queued.attainment(slo)


def test_without_pressure_nobody_is_refused_for_a_target():
    workload = poisson(Lengths(500, 8), rate=4.0, num_requests=60, seed=2)
    assert run(replace(PAIR, ttft_target_s=2.0), workload).recorder.num_refused == 0


def test_a_clients_urgent_requests_go_before_its_others():
    arrivals = np.concatenate([np.zeros(40), np.array([1.0])])
    urgent = replace(Workload(arrivals, np.full(41, 1000), np.full(41, 4)), priorities=[1] * 40 + [0])
    result = run(PAIR, urgent)
    assert result.ttft_s[40] < 0.5
    assert run(PAIR, replace(urgent, priorities=None)).ttft_s[40] > 3.0


def test_who_wants_short_gaps_is_refused_where_no_decode_worker_has_such_steps():
    """Beside long prompts a step of a worker of both roles takes 60 ms, and 11 without."""
    mixed = SimConfig(None, None, WORKER, num_both=1, wire=Wire(rpc_s=1e-3), fidelity="exact")
    workload = Workload(np.arange(40) / 10, np.full(40, 1000), np.full(40, 60))
    refused = run(replace(mixed, itl_target_s=0.03), workload).recorder.num_refused
    assert 10 <= refused < 40
    assert run(mixed, workload).recorder.num_refused == 0
    assert run(replace(PAIR, itl_target_s=0.03), workload).recorder.num_refused == 0, "its steps are short"


@pytest.mark.parametrize("name", list(PREFERENCES))
def test_every_policy_serves_everybody(name):
    blocks = [(number % 5, 100 + number) for number in range(60)]
    workload = Workload(np.arange(60) / 12, np.full(60, 1024), np.full(60, 8), blocks)
    result = run(replace(PAIR, num_prefill=2, num_decode=2, placement=name), workload)
    assert result.num_done == 60
    assert result.recorder.num_cached.sum() > 0


def test_a_mix_changes_when_it_is_said_to():
    workload = changing([Phase(10, 20, 1000, 8), Phase(5, 40, 64, 200)], seed=3)
    first = workload.arrival_s < 10
    assert set(workload.num_prompt[first]) == {1000}
    assert set(workload.num_output[~first]) == {200}
    assert workload.arrival_s[-1] < 15
    assert (np.diff(workload.arrival_s) >= 0).all()
    assert first.sum() == pytest.approx(200, rel=0.2)
