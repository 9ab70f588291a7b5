"""Workers of data-parallel attention: a prompt is in one lane, the product's scheduler fills them, a step waits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from headrace_core.request_trace import Workload
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import find_hardware
from headrace_core.roofline.model_shape import MODELS, Dtype
from headrace_planner.sim_capacity import wire_of, worker_spec
from headrace_planner.sim_config import SimConfig
from headrace_planner.sim_lone import lone_ttft_s
from headrace_planner.sim_roofline import Machine
from headrace_planner.simulator import _Simulation, simulate
from headrace_planner.step_times import StepShape, chunk_pairs
from headrace_planner.workload import Lengths, poisson

MACHINE = Machine(MODELS["deepseek-v3"], find_hardware("h200-attainable"), Parallelism(1, 8, 8), Dtype.FP8)
WORKER = worker_spec(MACHINE, kv_tokens=1 << 20, max_rows=256, step_tokens=65_536, max_context=131_072)


def cluster(num_prefill: int = 1, num_decode: int = 1, num_both: int = 0, fidelity: str = "fast") -> SimConfig:
    return SimConfig(
        WORKER, WORKER, WORKER, num_prefill, num_decode, num_both, wire=wire_of(MACHINE), fidelity=fidelity
    )


def step_shape(chunks: Iterable[tuple[int, int, int]]) -> StepShape:
    """Return the shape of prompt chunks, each of (lane, start, tokens)."""
    shape = StepShape()
    for lane, start, count in chunks:
        shape.add_chunk(start, count, lane)
    return shape


def test_a_step_waits_for_the_lane_that_has_most() -> None:
    times = WORKER.times
    long, short = (0, 0, 8192), (1, 0, 512)
    alone, beside = times.step_s(step_shape([long])), times.step_s(step_shape([long, short]))
    assert alone <= beside < 1.02 * alone
    assert times.step_s(step_shape([long, (0, 0, 512)])) > 1.02 * alone, "in one lane they add up"
    spread = times.step_s(StepShape(prompt_tokens=4096, prompt_pairs=8 * chunk_pairs(0, 512), num_chunks=8))
    assert times.step_s(step_shape([(lane, 0, 512) for lane in range(8)])) == pytest.approx(spread)


def test_a_shape_tells_its_lanes_apart() -> None:
    shape = step_shape([(0, 0, 100), (1, 10, 300), (0, 50, 50)])
    assert (shape.prompt_tokens, shape.num_chunks) == (450, 3)
    assert shape.lanes == {0: (150, chunk_pairs(0, 100) + chunk_pairs(50, 50)), 1: (300, chunk_pairs(10, 300))}
    assert shape.prompt_pairs == sum(pairs for _, pairs in shape.lanes.values())


def test_short_prompts_wait_for_a_long_one_in_another_lane() -> None:
    """The product gives a lane what the others do not ask for, so one step may hold all of a long prompt."""
    prompts = np.array([60_000] + [1000] * 7)
    result = simulate(cluster(), Workload(np.zeros(8), prompts, np.full(8, 2)))
    lone_s = lone_ttft_s(WORKER, wire_of(MACHINE), 60_000)
    assert lone_s > 5
    assert (result.ttft_s > 0.9 * lone_s).all()


def test_prompts_fill_lanes_evenly_though_computed_ones_are_held_there() -> None:
    """Lanes that have room, and no regard to what is to compute there, would give 0.7 and 1.2 s."""
    result = simulate(cluster(), poisson(Lengths(4096, 64), rate=20, num_requests=300))
    assert np.median(result.ttft_s) < 0.5
    assert np.percentile(result.ttft_s, 95) < 0.8


@pytest.mark.parametrize("shape", [(2, 1, 0), (0, 0, 2)])
def test_fast_and_exact_agree_on_lanes(shape: tuple[int, int, int]) -> None:
    workload = poisson(Lengths(2000, 30, 0.5, 0.5), rate=20, num_requests=120, seed=5)
    found = []
    for fidelity in ("exact", "fast"):
        simulation = _Simulation(cluster(*shape, fidelity=fidelity), workload)
        simulation.run()
        simulation.check_integrity()
        found.append(simulation.result(0.0))
    exact, fast = found
    assert fast.ttft_s.mean() == pytest.approx(exact.ttft_s.mean(), rel=0.1)
    assert fast.e2e_s.mean() == pytest.approx(exact.e2e_s.mean(), rel=0.1)


def test_a_prompt_must_fit_one_lane() -> None:
    small = replace(WORKER, num_pages=8 * 100)
    config = replace(cluster(), prefill=small, decode=small)
    result = simulate(config, Workload(np.zeros(2), np.array([101 * 64, 90 * 64]), np.full(2, 2)))
    assert (result.num_done, result.recorder.num_refused) == (1, 1)
