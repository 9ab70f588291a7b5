"""Whether experts move: never for nothing, never to the worse, and not again for the same loads."""

from __future__ import annotations

import pytest
from headrace_core.expert_moves import (
    LEAST_GAIN,
    Network,
    arrivals,
    as_time_more,
    decide,
    is_enough,
    loss,
    rank_loads,
    settled,
)
from headrace_core.expert_placement import balanced, in_order
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def groups(draw: st.DrawFn):
    """Loads of some layers, of E experts on R ranks, and where they lie: as numbered, with replicas or none."""
    num_ranks = draw(st.sampled_from([2, 3, 4]))
    count = num_ranks * draw(st.integers(1, 6))
    redundant = num_ranks * draw(st.integers(0, min(3, count - count // num_ranks)))
    of_layer = st.lists(st.floats(0.0, 100.0), min_size=count, max_size=count)
    loads = dict(enumerate(draw(st.lists(of_layer, min_size=1, max_size=4))))
    return loads, dict.fromkeys(loads, in_order(count, num_ranks, redundant).ranks)


@settings(max_examples=150, deadline=None)
@given(groups(), st.floats(0.0, 0.3))
def test_experts_move_only_if_the_loss_falls_by_enough_and_no_layer_gets_worse(group, least_gain):
    loads, slots = group
    decision = decide(loads, slots, least_gain=least_gain)
    assert decision.loss_now == loss(loads, slots)
    after = {**slots, **decision.layers}
    assert loss(loads, after) == pytest.approx(decision.loss_then)
    if decision.layers:
        assert decision.loss_now - decision.loss_then >= least_gain
    for layer, of_layer in loads.items():
        assert max(rank_loads(of_layer, after[layer])) <= max(rank_loads(of_layer, slots[layer]))
        assert [len(rank) for rank in after[layer]] == [len(rank) for rank in slots[layer]]
        assert {expert for rank in after[layer] for expert in rank} == set(range(len(of_layer)))


@settings(max_examples=100, deadline=None)
@given(groups())
def test_what_was_moved_stays_while_loads_are_the_same(group):
    loads, slots = group
    after = {**slots, **decide(loads, slots, least_gain=0.02).layers}
    assert not decide(loads, after, least_gain=0.02).layers


def test_chance_moves_nothing_and_skew_does():
    slots = {3: in_order(8, 4).ranks}
    assert not decide({3: [10, 11, 10, 9, 10, 10, 11, 9]}, slots).layers
    decision = decide({3: [40, 40, 5, 5, 5, 5, 5, 5]}, slots)
    assert decision.loss_now == pytest.approx(1 - 27.5 / 80)
    assert decision.loss_now - decision.loss_then > LEAST_GAIN
    assert max(rank_loads([40, 40, 5, 5, 5, 5, 5, 5], decision.layers[3])) == 45


def test_few_tokens_decide_nothing():
    assert is_enough({1: [640.0] + [0.0] * 9})
    assert not is_enough({1: [640.0] * 10, 2: [639.0] + [0.0] * 9})
    assert not is_enough({})


def test_the_layer_that_wins_most_moves_first():
    loads = {0: [8.0, 8, 1, 1], 1: [80.0, 80, 10, 10], 2: [1.0, 1, 1, 1]}
    assert list(decide(loads, dict.fromkeys(loads, in_order(4, 2).ranks)).layers) == [1, 0]


@settings(max_examples=100, deadline=None)
@given(groups(), st.randoms(use_true_random=False))
def test_what_stays_keeps_its_slot_and_every_share_is_somewhere(group, random):
    loads, slots = group
    of_layer, before = loads[0], list(slots[0])
    random.shuffle(before)
    placed = balanced(of_layer, len(before), redundant=sum(map(len, before)) - len(of_layer))
    after = settled(tuple(before), placed)
    assert sorted(map(sorted, after)) == sorted(map(list, placed.ranks))
    for mine, then in zip(before, after, strict=True):
        assert all(then[slot] == expert for slot, expert in enumerate(mine) if expert in then)
        assert [then[slot] for slot in arrivals(mine, then)] == [e for e in then if e not in mine]


def test_shares_stay_on_their_node():
    before = ((0, 1), (2, 3), (4, 5), (6, 7))
    placed = balanced([1.0] * 8, 4, num_groups=2, num_nodes=2)
    node = settled(before, placed, num_nodes=2)[:2]
    assert sorted(e for rank in node for e in rank) == sorted(e for rank in placed.ranks[:2] for e in rank)
    skewed = [9.0, 9, 1, 1, 1, 1, 1, 1]
    moved = decide({0: skewed}, {0: before}, Network(2, 2)).layers[0]
    assert {expert for rank in moved[:2] for expert in rank} == {0, 1, 2, 3}, "groups stay whole on a node"


def test_replicas_lie_behind_what_a_rank_has():
    assert in_order(4, 2).ranks == ((0, 1), (2, 3))
    assert in_order(4, 2, 2).ranks == ((0, 1, 2), (0, 2, 3))
    assert in_order(4, 4, 12).ranks == ((0, 1, 2, 3),) * 4
    for redundant, problem in ((3, "do not divide"), (-2, "0 to 4"), (6, "0 to 4")):
        with pytest.raises(ValueError, match=problem):
            in_order(4, 2, redundant)


def test_a_quarter_of_the_time_is_a_third_more():
    assert as_time_more(0.25) == pytest.approx(1 / 3)
