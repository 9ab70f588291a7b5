"""Roofline, simulator and plan say the same of the same; a plan says what it leaves out before what it promises."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from headrace_core.errors import InvalidRequestError
from headrace_core.request_trace import Workload
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import find_hardware
from headrace_core.roofline.model_shape import MODELS, Dtype, GqaShape
from headrace_core.roofline.step_load import StepLoad
from headrace_planner.__main__ import app
from headrace_planner.capacity import Demand, divisions, make_plan
from headrace_planner.cli_plan import as_dict, left_out
from headrace_planner.divisible import check_divides
from headrace_planner.sim_capacity import config_of, verify, verify_divisions, wire_of, worker_spec
from headrace_planner.sim_config import SimConfig
from headrace_planner.sim_result import Slo
from headrace_planner.sim_roofline import Machine
from headrace_planner.simulator import simulate
from headrace_planner.step_times import StepShape, chunk_pairs
from headrace_planner.workload import Lengths, poisson
from typer.testing import CliRunner

H200 = find_hardware("h200-attainable")
V3 = MODELS["deepseek-v3"]
MIXTRAL = MODELS["mixtral-8x7b"]
NODES = [Parallelism(8, 1, 8), Parallelism(1, 8, 8), Parallelism(1, 32, 32)]


def cluster(machine: Machine) -> SimConfig:
    spec = worker_spec(machine, kv_tokens=1 << 20, max_rows=512, step_tokens=65_536, max_context=16_384)
    return SimConfig(spec, spec, None, 1, 1, wire=wire_of(machine))


def lone(num_prompt: int, num_output: int) -> Workload:
    return Workload(np.zeros(1), np.array([num_prompt]), np.array([num_output]))


@pytest.mark.parametrize("model", ["deepseek-v3", "mixtral-8x7b"])
@pytest.mark.parametrize("parallel", NODES[:2], ids=str)
@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_a_lone_request_takes_what_the_roofline_says(model: str, parallel: Parallelism, fidelity: str) -> None:
    machine = Machine(MODELS[model], H200, parallel, Dtype.FP8)
    config = replace(cluster(machine), fidelity=fidelity)
    result = simulate(config, lone(4096, 33))
    prefill_s = machine.step(StepLoad.prefill(4096)).time_s
    calls_s = config.wire.admit_s + 2 * config.wire.rpc_s
    assert float(result.ttft_s[0]) - calls_s == pytest.approx(prefill_s, rel=0.04)
    assert result.itl_percentile(50) == pytest.approx(machine.step(StepLoad.decode(1, 4112)).time_s, rel=0.04)


@pytest.mark.parametrize("parallel", NODES[1:], ids=str)
def test_seven_groups_wait_for_the_one_that_has_a_prompt(parallel: Parallelism) -> None:
    machine = Machine(V3, H200, parallel, Dtype.FP8)
    config = cluster(machine)
    groups = parallel.dp
    times = config.prefill.times
    one, all_of_them = (
        times.step_s(StepShape(prompt_tokens=n * 4096, prompt_pairs=n * chunk_pairs(0, 4096), num_chunks=n))
        for n in (1, groups)
    )
    # Together they take little more than alone: experts have more tokens, attention what it had.
    assert one < all_of_them < 0.5 * groups * one


def test_goodput_is_never_above_the_rate_of_requests() -> None:
    machine = Machine(V3, H200, NODES[1], Dtype.FP8)
    workload = poisson(Lengths(2048, 256), rate=5, num_requests=40)
    result = simulate(cluster(machine), workload)
    assert result.goodput(Slo()) == pytest.approx(result.request_rate)
    assert 0 < result.goodput(Slo(ttft_s=float(np.median(result.ttft_s)))) < result.request_rate


@pytest.mark.parametrize("hardware", ["h100", "h200", "h200-attainable"])
def test_what_starting_a_collective_costs_is_not_met_away(hardware: str) -> None:
    demand = Demand(1000, 100, 1)
    with pytest.raises(InvalidRequestError, match=r"no division decodes within 0\.001 s.*fastest step takes 0\.001"):
        make_plan(MIXTRAL, find_hardware(hardware), demand, Slo(2.0, 0.001), dtype=Dtype.FP8)
    assert make_plan(MIXTRAL, find_hardware(hardware), demand, Slo(2.0, 0.004), dtype=Dtype.FP8).num_gpus


def test_heads_and_experts_are_divided_evenly_or_not_at_all() -> None:
    odd = replace(MIXTRAL, name="odd", num_heads=12, attention=GqaShape(6, 128))
    assert {way.tp for way in divisions(odd)} == {1, 2}
    assert {way.tp for way in divisions(MIXTRAL)} == {1, 2, 4, 8}
    few = replace(odd, moe=replace(odd.moe, num_experts=12))
    assert {way.ep for way in divisions(few)} == {1, 2, 4}
    with pytest.raises(ValueError, match="tp 8 does not divide the 12 heads of odd"):
        check_divides(odd, Parallelism(8, 1, 1))
    with pytest.raises(ValueError, match="neither divides the 6 key-value heads of odd nor is a multiple"):
        check_divides(odd, Parallelism(4, 1, 1))
    check_divides(odd, Parallelism(12, 1, 1))


def test_table_and_cost_are_of_the_cluster_that_was_simulated() -> None:
    plan = make_plan(V3, H200, Demand(4096, 64, 5), Slo(2.0, 0.05), dtype=Dtype.FP8)
    # All at once: far more than the means say.
    burst = Workload(np.zeros(60), np.full(60, 4096), np.full(60, 64))
    verified = verify(plan, burst)
    assert verified.config.num_prefill > config_of(plan).num_prefill
    corrected = plan.with_workers(verified.config.num_prefill, verified.config.num_decode)
    report = as_dict(corrected, verified)
    assert report["prefill"]["num_workers"] == verified.config.num_prefill
    assert report["num_gpus"] == verified.config.num_gpus == report["simulated"]["num_gpus"]
    assert corrected.cost_per_million_tokens > plan.cost_per_million_tokens
    assert corrected.link_bytes_per_s <= plan.link_bytes_per_s


def test_prompts_too_long_for_one_group_are_prefilled_by_all_gpus_of_a_worker() -> None:
    """Means let data-parallel attention look best; a prompt of 26,000 tokens takes one GPU over a second."""
    plan = make_plan(V3, H200, Demand(8000, 64, 1), Slo(1.2, 0.05), dtype=Dtype.FP8)
    data_parallel = next(option for option in plan.prefill_options if option.machine.parallel.dp > 1)
    plan = replace(plan, prefill=data_parallel)
    prompts = np.where(np.arange(40) % 4 == 0, 26_000, 2000)
    tried = verify_divisions(plan, Workload(np.arange(40.0), prompts, np.full(40, 64)))
    assert [pair[0].prefill.machine.parallel.dp > 1 for pair in tried] == [False, True]
    (best, found), (_, other) = tried
    assert found.is_met
    assert found.attainment > other.attainment
    assert best.num_gpus == found.config.num_gpus


@pytest.mark.parametrize("columns", ["60", "200"])
def test_a_plan_says_what_it_leaves_out_before_what_it_promises(columns: str) -> None:
    arguments = ["plan", "--workload", "2048,64,5"]
    text = " ".join(CliRunner().invoke(app, arguments, env={"COLUMNS": columns}).stdout.split())
    assert left_out(H200) in text
    assert text.index("Left out") < text.index("requests met both objectives")
    assert "…" not in text
    assert "which no kernel reaches" in left_out(find_hardware("h100"))
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert report["left_out"] == left_out(H200)
    assert report["num_gpus"] == report["simulated"]["num_gpus"]


def test_a_step_of_prompts_of_several_lengths_waits_for_the_longest():
    times = cluster(Machine(V3, H200, NODES[1], Dtype.FP8)).prefill.times
    mixed, alone = StepShape(), StepShape()
    alone.add_chunk(0, 6000)
    for tokens in (6000, 500, 500, 500):
        mixed.add_chunk(0, tokens)
    even = StepShape(0, 0, mixed.prompt_tokens, mixed.prompt_pairs, mixed.num_chunks)
    assert times.step_s(even) < times.step_s(alone) < times.step_s(mixed)
