"""The four workloads at full size: as a bench would ask them, and never faster than the roofline."""

from __future__ import annotations

import re

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
    simulated,
    workload_of,
)  # fmt: skip
from headrace_planner.simulator import simulate

from tests.perf.workloads.table import BEGIN, DOCS, END, latency_row, of_simulated, rate_row, table, write


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
    # Batches of several sizes take a little less on average than one of mean size.
    assert cell.figures["mean_itl_ms"] > 1e3 * cell.step().time_s * 0.97
    assert cell.result.num_done == 256


def numbers(row):
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", row)]


@pytest.mark.parametrize(("model", "name"), [("deepseek-v3", "summarization"), ("mixtral-8x7b", AT_ONCE)])
def test_the_docs_show_what_is_simulated_now(model, name):
    cell, page = of_simulated(simulated(model, name)), DOCS.read_text()
    shown = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    rows = [row for row in shown if row.startswith(f"| {name} | {model} |")]
    for row, now in zip(rows, (rate_row(cell), latency_row(cell)), strict=True):
        # 3 %: what is simulated may change a little without a new table.
        assert numbers(row) == pytest.approx(numbers(now), rel=0.03), "make bench-workloads writes it"
    assert len(shown) > 2 * 4 * len(MODELS), "each workload has a row in both halves for what is simulated and served"


def test_a_table_is_put_between_its_marks_and_says_what_was_not_measured(tmp_path):
    rate = rate_of("mixtral-8x7b", "summarization")
    found = simulate(cluster_of("mixtral-8x7b"), workload_of("summarization", rate, 20))
    text = table([of_simulated(Simulated("mixtral-8x7b", "summarization", rate, found))], [])
    assert text.startswith("Served: not measured.")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(text, page)
    assert page.read_text() == f"before\n{BEGIN}\n{text}\n{END}\nafter\n"
