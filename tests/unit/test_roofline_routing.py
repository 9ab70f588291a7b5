import random

import pytest
from headrace_core.roofline.routing import UNIFORM, Routing, expected_distinct


@pytest.mark.parametrize(("num_tokens", "distinct", "tokens_each"), [(8, 57.4, 1.1), (128, 251.6, 4.1)])
def test_distinct_experts_of_deepseek_v3_are_as_counted_by_hand(num_tokens, distinct, tokens_each):
    found = expected_distinct(UNIFORM.probabilities(256, 8), num_tokens)
    assert round(found, 1) == distinct
    assert round(num_tokens * 8 / found, 1) == tokens_each


def test_distinct_experts_agree_with_drawing_them():
    probabilities = Routing(zipf=1.0).probabilities(32, 4)
    draw = random.Random(1)
    rounds = 2000
    hits = sum(any(draw.random() < q for _ in range(6)) for _ in range(rounds) for q in probabilities)
    assert hits / rounds == pytest.approx(expected_distinct(probabilities, 6), rel=0.02)


@pytest.mark.parametrize("zipf", [0.0, 0.5, 1.0, 3.0])
def test_a_token_chooses_k_experts_and_none_twice(zipf):
    probabilities = Routing(zipf).probabilities(64, 6)
    assert sum(probabilities) == pytest.approx(6)
    assert max(probabilities) <= 1.0


def test_skew_touches_fewer_experts_and_loads_ranks_unevenly():
    skewed = Routing(1.0)
    assert expected_distinct(skewed.probabilities(256, 8), 64) < expected_distinct(UNIFORM.probabilities(256, 8), 64)
    assert UNIFORM.imbalance(256, 8, 32) == pytest.approx(1.0)
    assert skewed.imbalance(256, 8, 32) > 2


def test_balancing_evens_out_what_whole_experts_allow():
    skewed, balanced = Routing(0.5), Routing(0.5, is_balanced=True)
    assert balanced.imbalance(256, 8, 8) < 1.03 < skewed.imbalance(256, 8, 8)
    assert all(len(rank) == 32 for rank in balanced.ranks(256, 8, 8))


def test_measured_histogram_takes_the_place_of_a_model():
    routing = Routing(histogram=(3, 1, 2, 2))
    assert routing.probabilities(4, 2) == pytest.approx((0.75, 0.25, 0.5, 0.5))
    assert routing.imbalance(4, 2, 2) == pytest.approx(1.0)
    assert Routing(histogram=(100, 1, 1, 1)).probabilities(4, 2) == pytest.approx((1, 1 / 3, 1 / 3, 1 / 3))


def test_histogram_of_another_model_is_refused():
    with pytest.raises(ValueError, match="experts"):
        Routing(histogram=(1, 2)).probabilities(4, 2)
    with pytest.raises(ValueError, match="all 0"):
        Routing(histogram=(0, 0)).probabilities(2, 1)


@pytest.mark.parametrize("ep", [1, 3, 8])
def test_every_expert_has_one_rank(ep):
    routing = Routing(1.0)
    placed = sorted(q for rank in routing.ranks(8, 2, ep) for q in rank)
    assert placed == sorted(routing.probabilities(8, 2))
