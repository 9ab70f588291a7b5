"""Placement of experts: every expert placed, replicas apart, and as even as the best there is on small cases."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from headrace_core.expert_placement import Placement, balanced, in_order
from headrace_core.roofline.routing import Routing
from hypothesis import given, settings
from hypothesis import strategies as st

LOADS = st.lists(st.floats(0.0, 100.0), min_size=4, max_size=48)


@settings(max_examples=100, deadline=None)
@given(LOADS, st.sampled_from([1, 2, 3, 4, 8]), st.floats(0, 1))
def test_every_expert_is_placed_and_replicas_are_on_ranks_of_their_own(loads, num_ranks, share):
    redundant = int(share * min(2 * len(loads), len(loads) * (num_ranks - 1)))
    placed = balanced(loads, num_ranks, redundant=redundant)
    assert all(len(set(rank)) == len(rank) for rank in placed.ranks)
    slots = [expert for rank in placed.ranks for expert in rank]
    assert set(slots) == set(range(len(loads)))
    assert len(slots) == len(loads) + redundant
    assert max(map(len, placed.ranks)) <= -(-len(slots) // num_ranks)
    assert sum(placed.rank_loads(loads)) == pytest.approx(sum(loads))
    assert [len(ranks) for ranks in placed.owners()] == [slots.count(expert) for expert in range(len(loads))]


@settings(max_examples=60, deadline=None)
@given(LOADS, st.sampled_from([2, 4]))
def test_it_is_no_worse_than_as_numbered(loads, num_ranks):
    loads = loads[: len(loads) // num_ranks * num_ranks]
    assert balanced(loads, num_ranks).imbalance(loads) <= in_order(len(loads), num_ranks).imbalance(loads) + 1e-9


def test_as_numbered_stays_where_heaviest_first_is_worse():
    loads = [9.0, 12.0, 27.0, 27.0, 42.0, 0.0, 12.0, 33.0, 33.0, 39.0]
    assert balanced(loads, 2) == in_order(10, 2)


def best_of_all(loads, num_ranks, redundant):
    """The least load of the busiest rank over all placements with as many slots on each rank."""
    count = len(loads)
    room = (count + redundant) // num_ranks
    sets = list(combinations(range(count), room))
    least = float("inf")
    for ranks in product(sets, repeat=num_ranks):
        if len({expert for rank in ranks for expert in rank}) == count:
            least = min(least, max(Placement(ranks).rank_loads(loads)))
    return least


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(0, 2), st.sampled_from([(2, 4), (2, 6), (3, 3)])).flatmap(
        lambda of: st.tuples(
            st.just(of[0] * of[1][0]),
            st.just(of[1][0]),
            st.lists(st.floats(1.0, 50.0), min_size=of[1][1], max_size=of[1][1]),
        )
    )
)
def test_the_busiest_rank_is_near_the_best_of_all_placements(case):
    redundant, num_ranks, loads = case
    redundant = min(redundant, len(loads) * (num_ranks - 1))
    found = max(balanced(loads, num_ranks, redundant=redundant).rank_loads(loads))
    assert found <= best_of_all(loads, num_ranks, redundant) * 4 / 3 + 1e-9


def test_a_third_is_lost_to_skewed_experts_and_replicas_win_it_back():
    loads = Routing(zipf=0.5).probabilities(256, 8)
    assert in_order(256, 32).imbalance(loads) > 1.5
    assert balanced(loads, 32, redundant=32).imbalance(loads) < 1.01
    heavy = Routing(zipf=1.0).probabilities(256, 8)
    assert balanced(heavy, 32).imbalance(heavy) > 2
    assert balanced(heavy, 32, redundant=32).imbalance(heavy) < 1.05


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.1, 100.0), min_size=32, max_size=32), st.sampled_from([0, 8, 16]))
def test_groups_stay_on_their_node_with_all_their_replicas(loads, redundant):
    num_ranks, num_nodes, num_groups = 8, 2, 4
    placed = balanced(loads, num_ranks, redundant=redundant, num_groups=num_groups, num_nodes=num_nodes)
    nodes = [{rank // 4 for rank in ranks} for ranks in placed.owners()]
    assert all(len(node) == 1 for node in nodes)
    for group in range(num_groups):
        assert len(set().union(*nodes[group * 8 : (group + 1) * 8])) == 1
    assert {len(rank) for rank in placed.ranks} == {(32 + redundant) // num_ranks}


def test_without_as_many_groups_for_each_node_all_ranks_are_one_pool():
    loads = [float(i + 1) for i in range(12)]
    assert balanced(loads, 4, num_groups=3, num_nodes=2) == balanced(loads, 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"redundant": 5}, "5 replicas of 4 experts on 2 ranks: 0 to 4"),
        ({"redundant": -1}, "-1 replicas"),
        ({"num_nodes": 3}, "2 ranks do not divide among 3 nodes"),
    ],
)
def test_what_can_not_be_placed_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        balanced([1.0, 2.0, 3.0, 4.0], 2, **options)


def test_nothing_to_do_is_even():
    assert balanced([0.0] * 4, 2).imbalance([0.0] * 4) == 1.0
    assert in_order(5, 2) == Placement(((0, 1), (2, 3, 4)))
