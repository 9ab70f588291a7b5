"""Who holds what in a group of ranks, and what can't be shared out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from headrace_core.errors import StartupError
from headrace_core.families.config import GqaShape, ModelConfig
from headrace_core.families.config_json import parse_config
from headrace_core.ranks.layout import ExpertsBy, ParallelLayout
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS


@pytest.fixture
def config(tmp_path):
    def of(name: str) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIGS[name]))
        return parse_config(tmp_path)

    return of


@pytest.mark.parametrize(
    ("attention", "experts", "tp", "lanes"),
    [("tp1", "tp1", 1, 1), ("tp1", "ep4", 1, 4), ("tp2", "ep4", 2, 2), ("dp2", "ep4", 2, 2), ("dp2", "tp2", 1, 2)],
)
def test_attention_narrower_than_the_group_is_lanes(attention, experts, tp, lanes):
    layout = ParallelLayout.parse(attention, experts)
    assert (layout.attention_tp, layout.num_lanes, layout.size) == (tp, lanes, tp * lanes)
    ranks = [rank for lane in range(lanes) for rank in layout.lane_ranks(lane)]
    assert ranks == list(range(layout.size))
    assert [(layout.lane(rank), layout.place(rank)) for rank in ranks] == [
        (lane, place) for lane in range(lanes) for place in range(tp)
    ]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_lane_has_every_head_and_token_once(tp):
    layout = ParallelLayout(tp, ExpertsBy.EXPERT, 4)
    for lane in range(layout.num_lanes):
        ranks = layout.lane_ranks(lane)
        assert [head for rank in ranks for head in layout.heads(rank, 8)] == list(range(8))
        assert [row for rank in ranks for row in layout.vocabulary(rank, 163)] == list(range(163))


@pytest.mark.parametrize(("tp", "num_kv_heads"), [(1, 2), (2, 2), (4, 2), (4, 1), (2, 8)])
def test_a_rank_has_the_key_heads_that_its_queries_ask(tp, num_kv_heads):
    layout, num_heads = ParallelLayout(tp, ExpertsBy.COLUMNS, tp), 8
    for rank in range(tp):
        heads = layout.heads(rank, num_heads)
        asked = sorted({head * num_kv_heads // num_heads for head in heads})
        assert list(layout.kv_heads(rank, num_kv_heads)) == asked


def test_experts_lie_in_a_row_or_on_all_ranks():
    assert ParallelLayout.parse("tp1", "ep4").contiguous_experts(8) == ((0,), (0,), (1,), (1,), (2,), (2,), (3,), (3,))
    assert ParallelLayout.parse("tp2", "tp2").contiguous_experts(3) == ((0, 1),) * 3


def test_latents_are_whole_on_each_rank_and_divided_by_lanes(config):
    config, size = config("v3"), 2
    values = config.num_layers * 10 * 100 * (16 + 8)
    assert ParallelLayout().cache_bytes(config, 10, 100, size) == values * size
    assert ParallelLayout.parse("tp4", "ep4").cache_bytes(config, 10, 100, size) == values * size
    assert ParallelLayout.parse("dp2", "ep2").cache_bytes(config, 10, 100, size) == values * size // 2


def test_keys_and_values_are_divided_by_heads_until_there_is_one(config):
    config, size = config("mixtral"), 2
    assert isinstance(config.attention, GqaShape)
    values = config.num_layers * 8 * 100 * config.attention.num_kv_heads * config.attention.head_dim * 2
    per_rank = {
        ("tp1", "tp1"): values,
        ("tp2", "tp2"): values // 2,
        ("tp4", "tp4"): values // 2,
        ("tp1", "ep4"): values // 4,
        ("tp2", "ep4"): values // 4,
    }
    for names, expected in per_rank.items():
        assert ParallelLayout.parse(*names).cache_bytes(config, 8, 100, size) == expected * size


@pytest.mark.parametrize(
    ("attention", "experts", "says"),
    [
        ("tp4", "ep2", "attention is over 4 ranks but experts over 2: spread them over 4"),
        ("tp2", "ep3", "attention's 2 ranks do not divide the experts' 3"),
        ("dp3", "ep4", "3 lanes do not divide the experts' 4 ranks"),
        ("ep2", "ep2", "attention 'ep2': say tpN or dpN"),
        ("tp2", "dp2", "experts 'dp2': say tpN or epN"),
        ("tp0", "tp1", "attention 'tp0'"),
        ("tp²", "tp1", "attention 'tp²'"),
    ],
)
def test_what_is_no_layout_is_refused(attention, experts, says):
    with pytest.raises(StartupError, match=says) as caught:
        ParallelLayout.parse(attention, experts)
    assert caught.value.reason == "BAD_RANKS"


def test_a_network_that_does_not_divide_is_refused_with_every_size(config):
    with pytest.raises(StartupError, match="4 heads by attention's 3 ranks; 8 experts by 3 ranks") as caught:
        ParallelLayout(3, ExpertsBy.EXPERT, 3).check(config("v3"))
    assert caught.value.reason == "BAD_RANKS"
    with pytest.raises(StartupError, match="16 columns of an expert by 3 ranks"):
        ParallelLayout(1, ExpertsBy.COLUMNS, 3).check(config("v3"))
    mixtral = config("mixtral")
    odd = replace(mixtral, num_heads=12, attention=GqaShape(num_kv_heads=3, head_dim=8))
    with pytest.raises(StartupError, match="3 key/value heads by attention's 2 ranks"):
        ParallelLayout(2, ExpertsBy.COLUMNS, 2).check(odd)
    ParallelLayout(4, ExpertsBy.EXPERT, 4).check(mixtral)
