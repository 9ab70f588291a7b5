"""Real workers measure; the command reads them and lays them over the page."""

import asyncio
import json

import pytest
from headrace_client import Client
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.request import SamplingParams
from headrace_core.roofline.hardware import HARDWARE
from headrace_core.roofline.model_shape import Dtype, ModelShape
from headrace_core.roofline.roofline import predict_step
from headrace_core.roofline.step_load import StepLoad
from headrace_core.testing.async_test import eventually
from headrace_planner.__main__ import app
from headrace_planner.measured import load_measured
from typer.testing import CliRunner

PROMPT = "Once upon a time there was a little fox named Zorvim. " * 4


@pytest.fixture(scope="module")
def workers(model_dir):
    """Metrics addresses of a prefill worker that predicts for this CPU and a decode worker that does for an H200."""
    worker, decode = {"roofline-every-steps": 1}, {"hardware": "h200", "max-step-sequences": 1}
    with LocalCluster(model_dir, worker_options=worker, decode_options=decode) as cluster:
        with Client(cluster.router_address) as client:
            for _ in range(2):
                client.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))
        addresses = {process.role: process.metrics_address for process in cluster.workers}
        # A worker counts a measured step when it has predicted it, and before the first it measures its machine.
        for role, num_steps in {"prefill": 2, "decode": 16}.items():
            counted = eventually(
                lambda role=role, n=num_steps: num_counted(addresses[role], role) == n, f"{role} steps"
            )
            asyncio.run(counted)
        yield addresses


def num_counted(address, phase):
    (worker,) = json.loads(run("--json", "--metrics", address))["workers"]
    return worker["sampled"].get(phase, {"num_steps": 0})["num_steps"]


def run(*arguments):
    result = CliRunner().invoke(app, ["roofline", "--live", *map(str, arguments)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_table_shows_both_sides(workers):
    shown = run("--metrics", workers["prefill"], "--metrics", workers["decode"])
    assert "expert_gate+expert_up" in shown
    assert "attention_absorbed" in shown
    assert "kv_up_proj+attention_naive" in shown
    assert "model in bf16 on h200" in shown


def test_predictions_are_those_of_the_steps_that_ran(workers, model_dir):
    (worker,) = json.loads(run("--json", "--metrics", workers["decode"]))["workers"]
    sampled = worker["sampled"]["decode"]
    assert sampled["num_steps"] == sampled["num_sequences"] == 16
    # Prompt and first token come from the prefill worker; each step reads the cache of all tokens so far.
    shortest = sampled["num_context_tokens"] / 16 - 3.5
    shape, h200 = ModelShape.load(model_dir), HARDWARE["h200"]
    steps = [
        predict_step(shape, h200, StepLoad.decode(1, shortest + i), dtype=Dtype.BF16, experts_read=2.0)
        for i in range(8)
    ]
    rows = {row["op"]: row for row in worker["operations"]}
    assert sum(row["predicted_us"] or 0.0 for row in rows.values()) == pytest.approx(
        sum(step.time_s for step in steps) / 8 * 1e6
    )
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert rows["attention_absorbed+absorb_value"]["bound"] == "memory"
    assert rows["sampling"]["ratio"] is None
    assert all(row["measured_us"] > 0 for row in rows.values())


def test_page_shows_what_was_measured(workers, model_dir, tmp_path):
    both = ("--metrics", workers["prefill"], "--metrics", workers["decode"])
    points, page = tmp_path / "points.json", tmp_path / "page.html"
    run(*both, "--model", model_dir, "--save-measured", points, "--build-page", page)
    measured = load_measured(points).points
    for phase, names in (
        ("prefill", {"q_down_proj", "kv_down_proj", "kv_up_proj", "attention_naive", "expert_gate", "head"}),
        ("decode", {"absorb_query", "attention_absorbed", "expert_up", "shared_experts", "dense_ffn"}),
    ):
        assert names <= {point.operation for point in measured if point.phase == phase}
    html = page.read_text()
    assert '"worker"' in html
    assert "mean of measured steps on cpu at" in html


def test_mistakes_are_named(workers):
    for arguments, code, said in (
        ([], 2, "once per worker"),
        (["--metrics", "127.0.0.1:1"], 1, "no metrics at"),
        (["--metrics", workers["decode"], "--model", "mixtral-8x7b", "--build-page", "/none/x"], 2, "runs model, not"),
    ):
        result = CliRunner().invoke(app, ["roofline", "--live", *arguments])
        assert result.exit_code == code
        assert said in result.stderr
