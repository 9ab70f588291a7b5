"""The planner's arithmetic, checked by hand or against the simulator."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from headrace_core.errors import InvalidRequestError, StartupError
from headrace_core.request_trace import load_trace, prefix_hit_share
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import find_hardware
from headrace_core.roofline.model_shape import MODELS, Dtype
from headrace_core.roofline.routing import Routing
from headrace_core.roofline.step_load import StepLoad
from headrace_planner import plots
from headrace_planner.__main__ import app
from headrace_planner.capacity import Demand, erlang_c, kv_tokens, make_plan, wait_percentile
from headrace_planner.measured_times import load_tables
from headrace_planner.plots import Figure, Line
from headrace_planner.sim_capacity import verify
from headrace_planner.sim_experts import sampled_imbalance
from headrace_planner.sim_fit import MeasuredStep, fit_linear, nonnegative_least_squares
from headrace_planner.sim_result import Slo, parse_slo
from headrace_planner.sim_roofline import Machine, roofline_times
from headrace_planner.sim_tradeoffs import crossover
from headrace_planner.step_times import Curve, LinearStepTimes, StepShape, chunk_pairs
from headrace_planner.workload import Lengths, parse_workload, poisson
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

H200 = find_hardware("h200-attainable")
V3 = MODELS["deepseek-v3"]


def node(tp: int, dp: int, ep: int) -> Machine:
    return Machine(V3, H200, Parallelism(tp, dp, ep), Dtype.FP8)


def test_a_plan_meets_its_objective_in_the_simulator() -> None:
    plan = make_plan(V3, H200, Demand(2048, 128, 10), Slo(2.0, 0.05), dtype=Dtype.FP8)
    assert plan.decode.step_s <= 0.05
    assert plan.prefill.ttft_s <= 2.0
    assert plan.transfer_bytes_per_s == pytest.approx(10 * 2048 * 70_272)
    verified = verify(plan, poisson(Lengths(2048, 128), rate=10, num_requests=150))
    assert verified.attainment >= 0.95
    gpu_hours = plan.num_gpus * H200.cost_per_hour
    assert plan.cost_per_million_tokens == pytest.approx(gpu_hours / (10 * 2176 * 3600) * 1e6)


def test_more_load_never_needs_fewer_gpus() -> None:
    gpus = [
        make_plan(V3, H200, Demand(2048, 256, rate), Slo(2.0, 0.05), dtype=Dtype.FP8).num_gpus
        for rate in (1, 10, 100, 1000)
    ]
    assert gpus == sorted(gpus)


@pytest.mark.parametrize(("slo", "phase"), [(Slo(2.0, 1e-6), "decodes"), (Slo(1e-6, 0.05), "prefills")])
def test_an_objective_that_nothing_meets_is_an_error_that_says_how_close(slo: Slo, phase: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"no division {phase}"):
        make_plan(V3, H200, Demand(2048, 128, 1), slo, dtype=Dtype.FP8)


def test_dp_attention_beats_tp_attention_at_large_batch_only() -> None:
    cross = crossover(node(8, 1, 8), node(1, 8, 8), context=4096)
    assert cross.batch is not None
    assert 8 < cross.batch < 256
    # The latent is not divided by TP: five times the sequences fit under DP, which repeats attention weights.
    assert kv_tokens(node(1, 8, 8)) > 4 * kv_tokens(node(8, 1, 8))


@pytest.mark.parametrize(("rows", "context"), [(32, 4096), (1024, 4096), (700, 1000)])
def test_tabulated_decode_times_are_the_rooflines(rows: int, context: int) -> None:
    machine = node(1, 8, 8)
    table = roofline_times(machine, max_rows=2048, max_tokens=65_536)
    assert table.step_s(StepShape(rows, rows * context)) == pytest.approx(machine.decode_s(rows, context), rel=0.05)


@pytest.mark.parametrize(("tokens", "count", "start"), [(8192, 8, 0), (1024, 64, 0), (1024, 8, 8192), (256, 8, 0)])
def test_tabulated_prefill_times_are_the_rooflines(tokens: int, count: int, start: int) -> None:
    machine = node(1, 8, 8)
    table = roofline_times(machine, max_rows=2048, max_tokens=65_536)
    shape = StepShape(prompt_tokens=tokens * count, prompt_pairs=count * chunk_pairs(start, tokens), num_chunks=count)
    exact = machine.step(StepLoad.prefill(tokens, start, batch=count)).time_s
    assert table.step_s(shape) == pytest.approx(exact, rel=0.1)


def test_erlang_c_by_hand() -> None:
    assert erlang_c(1, 0.5) == pytest.approx(0.5)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(2, 2.0) == 1.0
    assert wait_percentile(4, 1, 0.1) == 0.0
    assert wait_percentile(1, 11, 0.1) == math.inf


def test_few_tokens_are_uneven_by_chance() -> None:
    even = sampled_imbalance(Routing(), num_experts=256, top_k=8, ep=32, tokens=128, redundant=None)
    assert 1.0 < even < 1.6


def test_fit_finds_the_coefficients_of_a_linear_machine() -> None:
    truth = LinearStepTimes(fixed_s=0.004, row_s=1e-4, context_s=2e-8, prompt_token_s=5e-5, pair_s=3e-9, chunk_s=1e-3)
    random = np.random.default_rng(0)
    shapes = [
        StepShape(int(r), int(r * c), int(p), chunk_pairs(0, int(p)), int(p > 0))
        for r, c, p in random.integers(0, [64, 4096, 2048], (60, 3))
    ]
    fitted = fit_linear([MeasuredStep(shape, truth.step_s(shape)) for shape in shapes])
    for shape in shapes:
        assert fitted.step_s(shape) == pytest.approx(truth.step_s(shape), rel=1e-3)
    with pytest.raises(InvalidRequestError, match="too few"):
        fit_linear([])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 16))
def test_least_squares_stays_nonnegative_and_optimal(seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix, target = random.normal(size=(12, 4)), random.normal(size=12)
    x = nonnegative_least_squares(matrix, target)
    gradient = matrix.T @ (matrix @ x - target)
    assert (x >= 0).all()
    assert (gradient > -1e-6).all()
    assert abs(float(gradient @ x)) < 1e-6


def test_curves_interpolate_and_extrapolate() -> None:
    curve = Curve([1, 2, 4], [10, 20, 30])
    assert [curve(x) for x in (1, 1.5, 3, 6)] == [10, 15, 25, 40]


def test_traces_in_both_formats(tmp_path: Path) -> None:
    mooncake = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 1000, "input_length": 1000, "output_length": 5, "hash_ids": [0, 2]},
        {"timestamp": 0, "input_length": 700, "output_length": 3, "hash_ids": [0, 1]},
    ]
    mooncake.write_text("\n".join(json.dumps(line) for line in lines))
    workload = load_trace(mooncake)
    assert workload.arrival_s.tolist() == [0, 1]
    assert workload.num_prompt.tolist() == [700, 1000]
    assert prefix_hit_share(workload) == pytest.approx(512 / 1700)
    azure = tmp_path / "trace.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    workload = load_trace(azure)
    assert workload.arrival_s.tolist() == pytest.approx([0, 4.314579])
    assert workload.num_output.tolist() == [44, 109]
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InvalidRequestError, match="ContextTokens"):
        load_trace(tmp_path / "bad.csv")


def test_options_are_read_or_refused() -> None:
    assert parse_slo("ttft=2,itl=50ms") == Slo(2.0, 0.05)
    assert parse_workload("4096,256,10") == (Lengths(4096, 256), 10)
    for bad in ("x", "ttft=-1", "foo=1"):
        with pytest.raises(InvalidRequestError):
            parse_slo(bad)
    for bad in ("1,2", "0,1,1", "a,b,c"):
        with pytest.raises(InvalidRequestError):
            parse_workload(bad)


def test_missing_tables_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"mla_ms\.csv"):
        load_tables(tmp_path, ep=32)


def test_plots_are_small_svg_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.svg"
    plots.save([Figure("title", "x", "y", [Line("line", [1, 2], [3, 4])])], path)
    assert "<svg" in path.read_text()


def test_missing_matplotlib_is_a_readable_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(plots.importlib, "import_module", missing)
    with pytest.raises(StartupError, match=r"pip install 'headrace\[plots\]'"):
        plots.save([], tmp_path / "a.svg")
    asked = ["simulate", "--prefill", "1", "--decode", "1", "--workload", "64,2,5", "--requests", "2"]
    ended = CliRunner().invoke(app, [*asked, "--plot", str(tmp_path / "a.svg")])
    assert ended.exit_code == 1
    assert ended.stderr.startswith("error: plots need matplotlib")


def test_commands_print_json_and_refuse_nonsense() -> None:
    runner = CliRunner()
    plan = runner.invoke(app, ["plan", "--workload", "2048,128,5", "--no-simulate", "--json"])
    assert json.loads(plan.stdout)["num_gpus"] >= 16
    arguments = ["simulate", "--prefill", "1", "--decode", "1", "--workload", "512,16,5", "--requests", "40", "--json"]
    assert json.loads(runner.invoke(app, arguments).stdout)["num_done"] == 40
    assert runner.invoke(app, ["plan", "--workload", "1,2"]).exit_code == 2
    assert runner.invoke(app, ["simulate", "--prefill", "1", "--workload", "1,1,1"]).exit_code == 2
