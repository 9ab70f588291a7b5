"""Workers are added where an objective is missed, and only where that helps."""

from __future__ import annotations

import numpy as np
import pytest
from headrace_core.request_trace import Workload, prefix_hits
from headrace_planner.sim_capacity import correct
from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.sim_lone import is_out_of_reach, lone_tpot_s, lone_ttft_s
from headrace_planner.sim_result import Slo
from headrace_planner.simulator import simulate
from headrace_planner.step_times import LinearStepTimes

TIMES = LinearStepTimes(fixed_s=0.01, row_s=0.001, prompt_token_s=1e-4)
"""A prompt of 1,000 tokens takes 0.11 s, of 50,000 tokens 5.07 s; eight decode rows 18 ms."""
WORKER = WorkerSpec(TIMES, num_pages=20_000, max_step_tokens=8192, max_step_sequences=64)
WIRE = Wire(rpc_s=5e-4, admit_s=5e-4)
SLO = Slo(ttft_s=1.0, itl_s=0.03)
LONG = 50_000


def cluster(num_prefill: int = 1, num_decode: int = 1) -> SimConfig:
    return SimConfig(WORKER, WORKER, None, num_prefill, num_decode, wire=WIRE, fidelity="fast")


def steady(gap_s: float, *, num_output: int = 4, num_prompt: int = 1000, long_every: int = 0) -> Workload:
    """Return 100 requests, `gap_s` apart, every n-th of them long."""
    prompts = np.full(100, num_prompt)
    if long_every:
        prompts[long_every // 2 :: long_every] = LONG
    return Workload(np.arange(100, dtype=np.float64) * gap_s, prompts, np.full(100, num_output))


def test_a_plan_that_meets_the_objective_is_left_alone() -> None:
    verified = correct(cluster(2), steady(0.2), SLO)
    assert (verified.config.num_prefill, verified.config.num_decode) == (2, 1)
    assert verified.is_met
    assert len(verified.attempts) == 1


def test_missed_ttft_adds_prefill_workers_only() -> None:
    verified = correct(cluster(), steady(0.04), SLO)
    assert verified.is_met
    assert verified.config.num_prefill in (3, 4)
    assert verified.config.num_decode == 1
    assert verified.attempts[0].attainment < 0.95


def test_missed_itl_adds_decode_workers_only() -> None:
    verified = correct(cluster(4), steady(0.04, num_output=60), SLO)
    assert verified.slow == 0
    assert verified.is_met
    assert verified.config.num_prefill == 4
    assert verified.config.num_decode > 1


def test_a_full_decode_side_that_delays_first_tokens_is_found() -> None:
    few_slots = WorkerSpec(TIMES, num_pages=20_000, max_step_tokens=8192, max_step_sequences=2)
    config = SimConfig(WORKER, few_slots, None, 2, 1, wire=WIRE, fidelity="fast")
    verified = correct(config, steady(0.13, num_output=30), SLO)
    assert verified.is_met
    assert verified.config.num_prefill == 2
    assert verified.config.num_decode > 1
    assert not verified.attempts[1].is_kept, "prefill workers were tried first, and taken back"


def test_what_no_worker_can_reach_is_told_and_not_chased() -> None:
    workload = steady(0.5, long_every=10)
    verified = correct(cluster(8, 2), workload, SLO)
    assert verified.out_of_reach == pytest.approx(0.1)
    assert verified.goal == pytest.approx(0.95 * 0.9)
    assert verified.attainment == pytest.approx(0.9)
    assert verified.is_met
    assert (verified.config.num_prefill, verified.config.num_decode) == (8, 2)
    few = correct(cluster(8, 2), steady(0.5, long_every=50), SLO)
    assert few.out_of_reach == pytest.approx(0.02)
    assert few.goal == 0.95


def test_nothing_is_added_where_nothing_can_help() -> None:
    verified = correct(cluster(), steady(0.5), Slo(ttft_s=0.05, itl_s=0.03))
    assert verified.out_of_reach == 1.0
    assert len(verified.attempts) == 1
    assert not verified.is_met


def test_additions_that_do_not_help_are_taken_back() -> None:
    # A hand-off takes longer than ITL allows, however many workers there are.
    config = SimConfig(WORKER, WORKER, None, 2, 2, wire=Wire(latency_s=1.0), fidelity="fast")
    verified = correct(config, steady(0.2), SLO)
    assert verified.attainment == 0.0
    assert (verified.config.num_prefill, verified.config.num_decode) == (2, 2)
    tried = [(attempt.num_prefill, attempt.num_decode, attempt.is_kept) for attempt in verified.attempts]
    assert tried == [(2, 2, True), (2, 3, False), (3, 2, False)]
    assert verified.is_exhausted
    assert not verified.is_met


def test_lone_times_are_the_simulators() -> None:
    workload = Workload(np.array([0.0, 60.0]), np.array([1000, LONG]), np.array([50, 50]))
    result = simulate(cluster(), workload)
    lone = [lone_ttft_s(WORKER, WIRE, length) for length in (1000, LONG)]
    assert result.ttft_s == pytest.approx(lone)
    # The first gap has the hand-off in it as well.
    assert result.tpot_s == pytest.approx([lone_tpot_s(WORKER, 1000, 50), lone_tpot_s(WORKER, LONG, 50)], rel=0.15)


def test_a_long_prompt_whose_beginning_is_cached_is_in_reach() -> None:
    count = -(-LONG // 512)
    first = tuple(range(count))
    workload = Workload(np.array([0.0, 60.0]), np.array([LONG, LONG]), np.array([4, 4]), [first, (*first[:-2], -1, -2)])
    assert prefix_hits(workload).tolist() == [0, (count - 2) * 512]
    assert is_out_of_reach(cluster(), workload, SLO).tolist() == [True, False]
