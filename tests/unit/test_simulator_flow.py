"""The simulator keeps its books: every request ends once, nothing is lost, both fidelities agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from headrace_core.errors import InvalidRequestError
from headrace_core.request_trace import Workload
from headrace_planner.sim_config import Outage, SimConfig, Wire, WorkerSpec, random_outages
from headrace_planner.sim_result import SimResult, Slo
from headrace_planner.simulator import _Simulation, simulate
from headrace_planner.step_times import LinearStepTimes
from headrace_planner.workload import Lengths, closed_loop, poisson
from hypothesis import given, settings
from hypothesis import strategies as st

TIMES = LinearStepTimes(fixed_s=0.008, row_s=5e-5, context_s=2e-9, prompt_token_s=3e-5, pair_s=1e-10)
WORKER = WorkerSpec(TIMES, num_pages=6000, max_step_tokens=4096, max_step_sequences=64)
WIRE = Wire(rpc_s=5e-4, admit_s=5e-4)


def cluster(num_prefill: int = 2, num_decode: int = 2, num_both: int = 0, **options) -> SimConfig:
    return SimConfig(WORKER, WORKER, WORKER, num_prefill, num_decode, num_both, wire=WIRE, **options)


def run(config: SimConfig, workload: Workload) -> SimResult:
    simulation = _Simulation(config, workload)
    simulation.run()
    simulation.check_integrity()
    return simulation.result(0.0)


def small(seed: int = 0, num_requests: int = 60, rate: float = 8.0, osl: float = 40) -> Workload:
    return poisson(Lengths(1500, osl, 0.6, 0.6), rate=rate, num_requests=num_requests, seed=seed)


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
@pytest.mark.parametrize("shape", [(2, 2, 0), (0, 0, 3), (1, 1, 1)])
def test_every_request_ends_once_with_all_its_tokens(fidelity: str, shape: tuple[int, int, int]) -> None:
    workload = small()
    result = run(cluster(*shape, fidelity=fidelity), workload)
    assert result.num_done == len(workload)
    assert np.array_equal(result.recorder.num_tokens, workload.num_output)
    assert (result.ttft_s > 0).all()
    assert (result.e2e_s >= result.ttft_s).all()
    _, weights = result.recorder.gaps()
    assert weights.sum() == (workload.num_output - 1).sum()


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    shape=st.sampled_from([(1, 1, 0), (3, 1, 0), (1, 3, 0), (0, 0, 2), (2, 1, 1)]),
    rate=st.floats(1, 60),
    fidelity=st.sampled_from(["exact", "fast"]),
)
def test_conservation_holds_for_any_load(seed: int, shape: tuple[int, int, int], rate: float, fidelity: str) -> None:
    workload = small(seed, num_requests=25, rate=rate, osl=20)
    result = run(cluster(*shape, fidelity=fidelity), workload)
    assert np.array_equal(result.recorder.num_tokens, workload.num_output)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    fidelity=st.sampled_from(["exact", "fast"]),
    outages=st.lists(st.builds(Outage, st.floats(0, 8), st.integers(0, 3), st.floats(0.1, 5)), min_size=1, max_size=6),
    shape=st.sampled_from([(2, 2, 0), (0, 0, 4), (1, 2, 1)]),
)
def test_failing_workers_lose_nothing(
    seed: int, fidelity: str, outages: list[Outage], shape: tuple[int, int, int]
) -> None:
    workload = small(seed, num_requests=30, rate=6)
    result = run(cluster(*shape, fidelity=fidelity, outages=outages, detect_s=0.2), workload)
    assert np.array_equal(result.recorder.num_tokens, workload.num_output)
    _, weights = result.recorder.gaps()
    assert weights.sum() == (workload.num_output - 1).sum()


def test_a_failed_decode_worker_costs_a_second_prefill() -> None:
    workload = poisson(Lengths(1000, 200), rate=2, num_requests=20, seed=1)
    calm = run(cluster(1, 2), workload)
    hit = run(cluster(1, 2, outages=(Outage(5.0, 1, 3.0),), detect_s=0.5), workload)
    assert hit.recorder.num_attempts.max() == 2
    assert np.array_equal(hit.recorder.num_tokens, workload.num_output)
    prefilled = [sum(w.num_tokens for w in result.workers if w.role == "prefill") for result in (calm, hit)]
    assert prefilled[1] > prefilled[0]
    assert hit.itl_percentile(99.99) > 0.5


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_the_same_seed_gives_the_same_result(fidelity: str) -> None:
    config = cluster(fidelity=fidelity, outages=random_outages(4, mtbf_s=5, repair_s=1, until_s=10, seed=3))
    first, second = (run(config, small(7)) for _ in range(2))
    assert np.array_equal(first.recorder.first_s, second.recorder.first_s)
    assert np.array_equal(first.recorder.last_s, second.recorder.last_s)


@pytest.mark.parametrize("shape", [(2, 1, 0), (1, 2, 0), (0, 0, 3)])
def test_fast_and_exact_agree_within_five_percent(shape: tuple[int, int, int]) -> None:
    workload = poisson(Lengths(2000, 60, 0.5, 0.5), rate=12, num_requests=150, seed=5)
    exact, fast = (run(cluster(*shape, fidelity=fidelity), workload) for fidelity in ("exact", "fast"))
    for of in (
        lambda r: r.ttft_s.mean(),
        lambda r: r.e2e_s.mean(),
        lambda r: np.nanmean(r.tpot_s),
        lambda r: r.itl_mean(),
        lambda r: r.output_rate,
    ):
        assert of(fast) == pytest.approx(of(exact), rel=0.05)


def test_littles_law_holds() -> None:
    workload = small(rate=10, num_requests=200)
    result = run(cluster(3, 2), workload)
    # Requests in flight, integrated over time from arrivals and ends, against rate times mean residence.
    ends = result.recorder.last_s
    times = np.sort(np.concatenate([result.recorder.arrival_s, ends]))
    in_flight = [(result.recorder.arrival_s <= t).sum() - (ends <= t).sum() for t in times[:-1]]
    area = float(np.dot(np.diff(times), in_flight))
    assert area == pytest.approx(float(result.e2e_s.sum()), rel=1e-6)
    assert result.num_done / result.end_s * float(result.e2e_s.mean()) == pytest.approx(area / result.end_s, rel=1e-6)


def test_a_lone_request_takes_the_sum_of_its_parts() -> None:
    workload = Workload(np.zeros(1), np.array([2048]), np.array([3]))
    wire = Wire(bytes_per_token=1000, bandwidth=1e6, latency_s=0.01, admit_s=0.001, rpc_s=0.002)
    result = run(SimConfig(WORKER, WORKER, None, 1, 1, wire=wire, fidelity="exact"), workload)
    prefill_s = 0.008 + 2048 * 3e-5 + 2048 * 2049 / 2 * 1e-10
    ttft_s = 0.001 + 0.002 + prefill_s + 0.002
    assert result.ttft_s[0] == pytest.approx(ttft_s)
    steps_s = sum(0.008 + 5e-5 + 2e-9 * context for context in (2049, 2050))
    assert result.e2e_s[0] == pytest.approx(ttft_s + 0.002 + 2.048 + 0.01 + steps_s + 0.002)


def test_shared_prefixes_are_computed_once() -> None:
    blocks = [(1, 2, 3, 10 + i) for i in range(8)]
    count = len(blocks)
    workload = Workload(np.arange(count) * 2.0, np.full(count, 2048), np.full(count, 4), blocks, 512)
    for fidelity in ("exact", "fast"):
        result = run(cluster(1, 1, fidelity=fidelity), workload)
        assert result.recorder.num_cached[0] == 0
        assert (result.recorder.num_cached[1:] == 1536).all()


def test_a_prompt_larger_than_every_pool_is_refused() -> None:
    workload = Workload(np.zeros(2), np.array([100_000_000, 100]), np.array([5, 5]))
    result = run(cluster(), workload)
    assert result.recorder.num_refused == 1
    assert result.num_done == 1


def test_little_memory_delays_but_loses_nothing() -> None:
    tight = WorkerSpec(TIMES, num_pages=80, max_step_tokens=4096, max_step_sequences=64)
    workload = poisson(Lengths(1000, 100), rate=20, num_requests=40)
    for fidelity in ("exact", "fast"):
        config = SimConfig(tight, tight, None, 1, 1, wire=WIRE, fidelity=fidelity)
        assert np.array_equal(run(config, workload).recorder.num_tokens, workload.num_output)


def test_closed_loop_keeps_as_many_in_flight_as_asked() -> None:
    workload = closed_loop(Lengths(500, 30), concurrency=4, num_requests=40)
    result = run(cluster(1, 1), workload)
    starts, ends = np.sort(result.recorder.arrival_s), np.sort(result.recorder.last_s)
    in_flight = [int((starts <= t).sum() - (ends <= t).sum()) for t in starts]
    assert max(in_flight) == 4


def test_workers_that_share_a_machine_slow_each_other_down() -> None:
    workload = closed_loop(Lengths(1000, 50), concurrency=4, num_requests=24)
    alone = run(cluster(1, 1, fidelity="exact"), workload)
    shared = run(cluster(1, 1, fidelity="exact", interference=(2.0, 2.0)), workload)
    assert shared.end_s > 1.1 * alone.end_s
    assert shared.end_s < 2.0 * alone.end_s + 0.1


def test_calls_take_longer_while_sequences_are_computed() -> None:
    wires = WIRE, replace(WIRE, crowding=5.0)
    for concurrency in (1, 6):
        lengths = Lengths(1000, 50, output_spread=0.5)
        workload = closed_loop(lengths, concurrency=concurrency, num_requests=8 * concurrency)
        plain, slow = (run(replace(cluster(1, 1, fidelity="exact"), wire=wire), workload) for wire in wires)
        if concurrency == 1:
            assert slow.end_s == plain.end_s
        else:
            assert slow.ttft_s[concurrency:].mean() > 1.05 * plain.ttft_s[concurrency:].mean()
            assert slow.recorder.gaps()[0].min() >= 0, "a stream's tokens are in order"


def test_goodput_counts_only_what_met_both_objectives() -> None:
    result = simulate(cluster(), small())
    assert result.goodput(Slo()) == pytest.approx(result.request_rate)
    assert result.goodput(Slo(ttft_s=0)) == 0
    assert result.goodput(Slo(itl_s=0)) == 0
    assert result.summary(Slo(1, 0.1))["num_done"] == 60


def test_a_cluster_that_cannot_serve_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match="can't serve"):
        SimConfig(WORKER, WORKER, None, num_prefill=2)


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_a_prompt_larger_than_every_prefill_pool_is_refused_and_holds_up_nobody(fidelity: str) -> None:
    small = replace(WORKER, num_pages=24)
    workload = Workload(np.arange(4) * 0.01, np.array([5000, 100, 100, 1500]), np.full(4, 5))
    result = run(SimConfig(small, WORKER, None, 1, 1, wire=WIRE, fidelity=fidelity), workload)
    assert (result.recorder.num_refused, result.num_done) == (1, 3)
    assert np.nanmax(result.ttft_s) < 1


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_a_request_that_outgrew_every_prefill_pool_survives_its_decode_worker(fidelity: str) -> None:
    small = replace(WORKER, num_pages=24)
    outages = [Outage(4.0, worker, 1000.0) for worker in (1, 2)]
    workload = Workload(np.zeros(3), np.full(3, 1400), np.full(3, 800))
    config = SimConfig(small, WORKER, None, 1, 3, wire=WIRE, fidelity=fidelity, outages=outages, detect_s=0.2)
    result = run(config, workload)
    assert np.array_equal(result.recorder.num_tokens, workload.num_output)
    assert sorted(result.recorder.num_attempts) == [1, 2, 2]
    decodes = [worker.num_tokens for worker in result.workers if worker.role == "decode"]
    assert max(decodes) > 2 * 1400, "the one that is left computed both anew"
