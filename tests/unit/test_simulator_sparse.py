"""The planner and the simulator of sparse attention: step times as the roofline has them, and what that changes."""

from __future__ import annotations

import json
from functools import cache

import pytest
from headrace_core.errors import InvalidRequestError
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import find_hardware
from headrace_core.roofline.model_shape import MODELS, Dtype
from headrace_core.roofline.step_load import StepLoad
from headrace_planner.__main__ import app
from headrace_planner.capacity import kv_tokens
from headrace_planner.measured_times import KernelTables, measured_times
from headrace_planner.sim_capacity import wire_of
from headrace_planner.sim_config import SimConfig, WorkerSpec
from headrace_planner.sim_roofline import Machine, roofline_times
from headrace_planner.simulator import simulate
from headrace_planner.step_times import ChosenPairs, Curve, StepShape, TableStepTimes
from headrace_planner.workload import Lengths, closed_loop
from typer.testing import CliRunner

DP8, TP8 = Parallelism(1, 8, 8), Parallelism(8, 1, 8)


def machine(parallel: Parallelism, model: str = "deepseek-v3.2") -> Machine:
    return Machine(MODELS[model], find_hardware("h200-attainable"), parallel, Dtype.FP8)


@cache
def times_of(parallel: Parallelism, model: str = "deepseek-v3.2") -> TableStepTimes:
    return roofline_times(machine(parallel, model), max_rows=2048, max_tokens=65_536)


@pytest.mark.parametrize(("start", "count"), [(0, 5), (0, 9), (0, 10), (0, 30), (4, 20), (8, 1), (9, 1), (50, 7)])
def test_a_chunk_s_chosen_pairs_are_those_that_counting_finds(start: int, count: int) -> None:
    top_k, score, near = 9, 0.25, 0.5
    seen = range(start + 1, start + count + 1)
    counted = near * sum(seen) if seen[-1] <= top_k else sum(min(one, top_k) for one in seen) + score * sum(seen)
    assert ChosenPairs(top_k, score, near)(start, count) == pytest.approx(counted)


@pytest.mark.parametrize("parallel", [DP8, TP8], ids=str)
@pytest.mark.parametrize(
    ("tokens", "count", "start"),
    [(8192, 8, 0), (1024, 64, 0), (2048, 8, 0), (2049, 8, 0), (32_768, 1, 0), (1024, 1, 0), (1024, 16, 100_000),
     (256, 8, 60_000)],
)  # fmt: skip
def test_tabulated_prefill_times_are_the_rooflines(tokens: int, count: int, start: int, parallel: Parallelism) -> None:
    one = machine(parallel)
    table = times_of(parallel)
    pairs = count * table.pairs_of(start, tokens)
    shape = StepShape(prompt_tokens=tokens * count, prompt_pairs=pairs, num_chunks=count)
    exact = one.step(StepLoad.prefill(tokens, start, batch=count)).time_s
    assert table.step_s(shape) == pytest.approx(exact, rel=0.06)


@pytest.mark.parametrize(("rows", "context"), [(64, 1500), (64, 2048), (64, 3000), (1024, 4096), (64, 100_000)])
def test_tabulated_decode_times_are_the_rooflines(rows: int, context: int) -> None:
    one = machine(DP8)
    table = times_of(DP8)
    assert table.step_s(StepShape(rows, rows * context)) == pytest.approx(one.decode_s(rows, context), rel=0.02)


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
@pytest.mark.parametrize(("prompt", "output"), [(1024, 16), (60_000, 32)])
def test_a_lone_request_takes_what_the_roofline_says(prompt: int, output: int, fidelity: str) -> None:
    one = machine(DP8)
    worker = WorkerSpec(times_of(DP8), kv_tokens(one) // 64, max_step_tokens=65_536, num_gpus=8, groups=8)
    config = SimConfig(worker, worker, None, 1, 1, wire=wire_of(one), fidelity=fidelity)  # pyright: ignore[reportArgumentType]
    result = simulate(config, closed_loop(Lengths(prompt, output), concurrency=1, num_requests=1))
    prefill_s = one.step(StepLoad.prefill(prompt)).time_s
    assert result.ttft_s[0] == pytest.approx(prefill_s, rel=0.04, abs=0.003)
    assert result.tpot_s[0] == pytest.approx(one.decode_s(1, prompt + output / 2), rel=0.04)


def test_long_prompts_take_less_than_with_attention_over_all() -> None:
    for context, is_less in ((1024, False), (131_072, True)):
        dense, sparse = (
            times_of(DP8, model).step_s(StepShape(64, 64 * context)) for model in ("deepseek-v3", "deepseek-v3.2")
        )
        assert (sparse < dense) is is_less


def test_plan_and_simulate_know_it_by_name() -> None:
    runner = CliRunner()
    asked = ["plan", "--workload", "32768,512,1", "--no-simulate", "--json", "--model"]
    plans = {
        model: json.loads(runner.invoke(app, [*asked, model]).stdout) for model in ("deepseek-v3", "deepseek-v3.2")
    }
    bytes_per_s = [plan["transfer_bytes_per_s"] for plan in plans.values()]
    assert bytes_per_s[1] / bytes_per_s[0] == pytest.approx(85_888 / 70_272)
    arguments = ["simulate", "--model", "deepseek-v3.2", "--prefill", "1", "--decode", "1", "--requests", "20"]
    found = json.loads(runner.invoke(app, [*arguments, "--workload", "8192,32,2", "--json"]).stdout)
    assert (found["num_done"], found["num_refused"]) == (20, 0)


def test_tables_of_attention_over_all_are_refused() -> None:
    line = Curve([1.0, 2.0], [1.0, 2.0])
    tables = KernelTables((1.0,), (line,), line, line, line)
    with pytest.raises(InvalidRequestError, match=r"deepseek-v3\.2's is over chosen ones"):
        measured_times(machine(DP8), tables, max_rows=64, max_tokens=1024)
