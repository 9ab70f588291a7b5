"""TP against DP attention as clients see it: where one overtakes the other."""

import pytest
from headrace_planner import sim_attention
from headrace_planner.sim_attention import crossing
from headrace_planner.workload import Lengths


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
