"""A simulation's figures are what `headrace bench` would make of the same tokens at the same times."""

from __future__ import annotations

import numpy as np
import pytest
from headrace_client.bench import figures as bench
from headrace_client.bench.goodput import parse_goodput
from headrace_client.bench.record import Record
from headrace_core.request_trace import Workload
from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.sim_figures import figures_of
from headrace_planner.sim_result import Recorder, SimResult, parse_slo, weighted_percentile
from headrace_planner.simulator import _Simulation
from headrace_planner.step_times import LinearStepTimes
from headrace_planner.workload import Lengths, closed_loop, poisson
from hypothesis import given, settings
from hypothesis import strategies as st

TIMES = LinearStepTimes(fixed_s=0.008, row_s=5e-5, context_s=2e-9, prompt_token_s=3e-5, pair_s=1e-10)
WORKER = WorkerSpec(TIMES, num_pages=6000, max_step_tokens=4096, max_step_sequences=64)
OPEN = poisson(Lengths(800, 40, 0.6, 0.6), rate=6.0, num_requests=80, seed=3)
CLOSED = closed_loop(Lengths(500, 30, 0.3, 0.5), concurrency=6, num_requests=40)


def _simulated(workload: Workload, fidelity: str) -> tuple[SimResult, list[Record]]:
    """Return a simulation's result, and what clients saw of each token, as a bench keeps it."""
    config = SimConfig(
        WORKER, WORKER, None, 1, 1, wire=Wire(rpc_s=5e-4, admit_s=5e-4),
        fidelity="exact" if fidelity == "exact" else "fast",
    )  # fmt: skip
    simulation = _Simulation(config, workload)
    records: dict[int, Record] = {}
    record_token = simulation._record_token

    def seen(request, at_s: float) -> None:
        record_token(request, at_s)
        record = records.setdefault(
            request.index, Record(request.index, request.arrival_s, request.arrival_s, num_prompt=request.num_prompt)
        )
        record.deltas.append((at_s, 1))
        record.end_s = at_s

    simulation._record_token = seen
    simulation.run()
    return simulation.result(0.0), list(records.values())


def _from_first_arrival(records: list[Record]) -> list[Record]:
    """Return the records on a bench's clock, which begins with the first request."""
    begin = min(record.intended_s for record in records)
    return [
        Record(
            each.index, each.intended_s - begin, each.sent_s - begin,
            [(at - begin, count) for at, count in each.deltas], each.end_s - begin, each.num_prompt,
        )
        for each in records
    ]  # fmt: skip


@pytest.mark.parametrize("workload", [OPEN, CLOSED], ids=["open", "closed"])
def test_a_simulation_has_the_figures_that_a_bench_has_of_the_same_tokens(workload: Workload) -> None:
    result, records = _simulated(workload, "exact")
    simulated = figures_of(result, parse_slo("ttft=50ms,tpot=9ms"))
    measured = bench.figures_of(_from_first_arrival(records), parse_goodput("ttft:50,tpot:9"))
    assert 0 < measured["request_goodput"] < measured["request_throughput"], "the objective parts them"
    shared = simulated.keys() - {"max_output_tokens_per_s"}  # seconds begin elsewhere
    for name in sorted(shared):
        assert simulated[name] == pytest.approx(measured[name], rel=1e-9), name
    assert measured["mean_itl_ms"] != pytest.approx(measured["mean_tpot_ms"], rel=1e-4), "two averages"
    assert simulated["max_output_tokens_per_s"] == max(bench.tokens_per_second(records))


def test_jumping_over_steps_counts_their_tokens_in_the_seconds_in_which_they_come() -> None:
    (exact, records), (fast, _) = _simulated(OPEN, "exact"), _simulated(OPEN, "fast")
    seconds = bench.tokens_per_second(records)
    assert [exact.recorder.tokens_in_second[second] for second in range(len(seconds))] == seconds
    assert sum(fast.recorder.tokens_in_second.values()) == pytest.approx(sum(seconds))
    for second, count in enumerate(seconds):
        assert fast.recorder.tokens_in_second[second] == pytest.approx(count, abs=0.05 * max(seconds))


def test_a_run_of_steps_is_cut_at_whole_seconds() -> None:
    recorder = Recorder(1)
    recorder.tokens(0.5, 0.25, 6, 12)  # at 0.75, 1.0, 1.25, 1.5, 1.75, 2.0
    assert dict(recorder.tokens_in_second) == {0: 2, 1: 8, 2: 2}
    recorder.tokens(3.0, 2.5, 2, 2)
    assert (recorder.tokens_in_second[5], recorder.tokens_in_second[8]) == (1, 1)


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5)), min_size=1, max_size=20),
    percent=st.floats(0, 100),
)
def test_a_weighted_percentile_is_numpy_s_of_each_value_so_often(pairs: list[tuple[float, int]], percent) -> None:
    values, counts = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    often = np.repeat(values, counts.astype(int))
    assert weighted_percentile(values, counts, percent) == pytest.approx(float(np.percentile(often, percent)))


def test_time_before_the_first_arrival_is_not_the_run_s() -> None:
    late = Workload(CLOSED.arrival_s + 1000.0, CLOSED.num_prompt, CLOSED.num_output)
    result, _ = _simulated(late, "exact")
    assert result.duration_s < 100
    assert result.request_rate == pytest.approx(result.num_done / result.duration_s)
    assert result.utilisation("decode") > 0.2
