"""Experts move while a group serves: the tokens are transformers', before, during and after; 2 and 4 gloo ranks."""

from __future__ import annotations

import pytest
from headrace_core.expert_moves import loss
from headrace_core.testing.rank_processes import run_ranks

from tests.parity.rebalance_cases import serve

NUM_TOKENS = 40
PROMPTS = [[5, 9, 33, 7, 8, 50, 61], [70, *range(3, 15), 99, 100, 20, 31, 77, 12, 15], [4, 44, 140]]


@pytest.fixture(scope="module")
def expected(checkpoint, oracle):
    known = {}

    def of(name):
        if name not in known:
            known[name] = [oracle(checkpoint(name)).greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
        return known[name]

    return of


def assert_as_transformers(answers, expected):
    assert len(answers) >= 3 * len(PROMPTS)
    for start in range(0, len(answers), len(PROMPTS)):
        assert answers[start : start + len(PROMPTS)] == expected


@pytest.mark.parametrize(
    ("name", "size", "attention"), [("v3", 2, "tp2"), ("v3", 4, "dp4"), ("mixtral", 2, "dp2")], ids=str
)
def test_tokens_stay_the_same_while_experts_move(name, size, attention, checkpoint, expected):
    """One lane, which has all tokens; four and two, each with its own, of which one may have none."""
    first, *others = run_ranks(size, serve, checkpoint(name), attention, PROMPTS, NUM_TOKENS)
    assert_as_transformers(first.tokens, expected(name))
    assert all(not moved.problem for moved in first.moved)
    moved = first.moved[0]
    assert moved.num_experts > 0
    assert moved.num_bytes > 0
    # The hook: some rank's experts were not ready before steps later, which were computed with those before.
    begun = others[-1].begun[: len(others[-1].switched)]  # the last may be under way when all is answered
    meanwhile = [switched - begin for begin, switched in zip(begun, others[-1].switched, strict=True)]
    assert min(meanwhile) >= 3, meanwhile
    assert len(meanwhile) >= moved.num_layers
    for other in others:
        assert other.switched == first.switched, "every rank switches between the same two steps"
        assert other.slots == first.slots
    rank_tokens = first.seen[-1].rank_tokens
    assert rank_tokens.keys() == first.slots.keys()
    assert all(len(of_ranks) == size for of_ranks in rank_tokens.values())


def test_a_rank_that_can_t_load_leaves_all_as_it_was(checkpoint, expected):
    first, other = run_ranks(2, serve, checkpoint("v3"), "tp2", PROMPTS, NUM_TOKENS, 1)
    assert_as_transformers(first.tokens, expected("v3"))
    assert first.moved[0].problem == "rank 1: DAMAGED_FILE: half of it is gone"
    assert first.moved[0].num_layers == 0
    assert not first.switched
    assert not other.switched
    assert first.slots == other.slots


def test_a_loss_is_of_all_layers():
    assert loss({1: [3.0, 1.0], 2: [1.0, 1.0]}, dict.fromkeys((1, 2), ((0,), (1,)))) == pytest.approx(0.25)
