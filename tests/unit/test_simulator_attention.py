"""TP against DP attention as clients see it: lanes that fill unevenly, where one overtakes the other."""

import pytest
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.operations import StepLoad
from headrace_planner import sim_attention
from headrace_planner.sim_attention import LaneTimes, attention_machine, crossing
from headrace_planner.sim_roofline import roofline_times
from headrace_planner.step_times import StepShape, chunk_pairs
from headrace_planner.workload import Lengths

LANES = 8
MACHINE = attention_machine("deepseek-v3", Parallelism(1, LANES, LANES))
EVEN = roofline_times(MACHINE, max_rows=64, max_tokens=65_536)
TIMES = LaneTimes(EVEN, LANES)


def prompts(count, tokens=4096):
    return StepShape(prompt_tokens=count * tokens, prompt_pairs=count * chunk_pairs(0, tokens), num_chunks=count)


def test_a_lone_prompt_takes_as_long_as_one_on_every_lane_but_for_the_experts():
    lone, full = TIMES.step_s(prompts(1)), TIMES.step_s(prompts(LANES))
    assert full == EVEN.step_s(prompts(LANES))
    assert lone < full
    routed = EVEN.moe(LANES * 4096) - EVEN.moe(4096)
    assert lone == pytest.approx(full - routed, rel=0.02)
    # The roofline itself, of one prompt: its lane has all of it.
    assert lone == pytest.approx(MACHINE.step(StepLoad.prefill(4096)).time_s, rel=0.1)


def test_one_prompt_more_than_lanes_waits_as_two_rounds_would():
    assert TIMES.step_s(prompts(LANES + 1)) > 1.5 * TIMES.step_s(prompts(LANES))


def test_decoding_is_as_it_was():
    assert TIMES.step_s(StepShape(32, 32 * 1000)) == EVEN.step_s(StepShape(32, 32 * 1000))


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ([1, 2, 4], [2, 2, 3], 4),
        ([3, 2, 4], [2, 1, 3], 1),
        ([3, 2, 4], [2, 3, 3], 4),  # ahead, behind, ahead again: what counts is the last
        ([1, 2, 4], [2, 3, 4], None),
    ],
)
def test_where_the_second_is_ahead_for_good(first, second, found):
    assert crossing([1, 2, 4], first, second) == found


def test_dp_loses_alone_and_wins_in_a_crowd(monkeypatch, tmp_path):
    monkeypatch.setattr(sim_attention, "_WORKLOADS", {"summarization": (Lengths(4096, 64), 256)})
    monkeypatch.setattr(sim_attention, "_MODELS", ("deepseek-v3",))
    monkeypatch.setattr(sim_attention, "_MEASURED", tmp_path / "none.json")
    study = sim_attention.attention(None)
    first, _, last, note = study.rows
    assert first[:3] == ["deepseek-v3", "summarization", "1"]
    assert last[2] == "256"
    tp, dp = (float(first[column].removesuffix(" ms")) for column in (3, 4))
    assert 2 * tp < dp, "one lane computes a lone prompt"
    tp, dp = (float(last[column].removesuffix(" ms")) for column in (5, 6))
    assert dp < tp
    assert 1 < int(first[7]) <= 256
    assert note[0].startswith("no measured points: make bench-parallel")
    assert len(study.figures) == 2


def test_measured_points_are_laid_beside_the_formula(tmp_path):
    (tmp_path / "parallel.json").write_text(
        '{"steps": {"layouts": [{"names": ["tp2 × ep2"], "batch": 8, "step_us": 5.0, "step_us_predicted": 4.0},'
        ' {"names": ["dp2 × ep2", "tp1 × ep2"], "batch": 8, "step_us": 7.0, "step_us_predicted": 6.0}]}}'
    )
    figure = sim_attention._measured_figure(tmp_path / "parallel.json")
    assert figure is not None
    assert [(line.label, line.ys) for line in figure.lines] == [
        ("tp2 × ep2, measured", [5.0]),
        ("tp2 × ep2, by formula", [4.0]),
        ("dp2 × ep2, measured", [7.0]),
        ("dp2 × ep2, by formula", [6.0]),
    ]
