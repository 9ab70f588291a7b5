"""Two micro-batches of a step, by turns: in which order they compute and meet, and what happens when one fails."""

from __future__ import annotations

import threading

import pytest
import torch
from headrace_core.batch.step import Chunk
from headrace_core.errors import StartupError
from headrace_core.model.dispatch import Dispatcher
from headrace_core.model.group_experts import DispatchedExperts
from headrace_core.model.micro_batches import cut
from headrace_core.ranks.group import OneRank, Ranks
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.turns import Turns
from headrace_core.ranks.two_batches import BatchesGroup, with_two_batches
from headrace_core.testing.doubling_experts import DoublingExperts
from headrace_core.testing.patient_group import PatientGroup
from headrace_core.testing.rank_threads import OnThread, RankThreads
from headrace_kernels.routing_rule import RoutedTokens


@pytest.fixture
def turns():
    made = Turns(least_rows=2)
    yield made
    made.close()


def test_each_computes_until_it_waits(turns):
    said = []

    def batch(name, count):
        for number in range(count):
            said.append(f"{name}{number}")
            turns.give()
        return name, turns.number, threading.get_ident()

    assert turns.number is None
    first, second = turns.run(lambda: batch("a", 2), lambda: batch("b", 4))
    # The second goes on alone where the first has ended.
    assert said == ["a0", "b0", "a1", "b1", "b2", "b3"]
    assert (first[:2], second[:2]) == (("a", 0), ("b", 1))
    assert first[2] == threading.get_ident() != second[2]
    assert turns.number is None
    turns.give()  # nobody to give it to


@pytest.mark.parametrize("who", [0, 1])
def test_one_that_fails_ends_the_other_where_it_waits_and_is_what_is_raised(turns, who):
    said = []

    def batch(number):
        turns.give()
        if number == who:
            raise ValueError(f"number {number}")
        turns.give()
        said.append(number)

    with pytest.raises(ValueError, match=f"number {who}"):
        turns.run(lambda: batch(0), lambda: batch(1))
    # The second computes up to its meeting before the first's failure, and the first not behind the second's.
    assert said == []
    assert turns.run(lambda: 1, lambda: 2) == (1, 2)


def test_while_one_waits_for_its_tokens_the_other_sends_its_own_and_computes_its_shared_expert(turns):
    """Each layer's dispatch and combine of one lie within the other's."""
    said: list[str] = []
    batches = [PatientGroup(said, name, turns.give) for name in "ab"]
    world = BatchesGroup(OneRank(), batches, turns)
    dispatcher = Dispatcher(((0, 1, 2, 3),), world, torch.device("cpu"))
    routed, shared = DoublingExperts("routed", said), DoublingExperts("shared", said)
    experts = DispatchedExperts(routed, 1, shared, dispatcher, Ranks(ParallelLayout(), world, world, turns))
    tokens = [torch.arange(4.0).view(2, 2), torch.arange(6.0).view(3, 2)]

    def layer(x):
        chosen = torch.tensor([[0, 1, 4]] * len(x))
        return experts(RoutedTokens(x, chosen, torch.full((len(x), 3), 0.5), None), x)

    outputs = turns.run(*[lambda x=x: layer(x) for x in tokens])
    for x, out in zip(tokens, outputs, strict=True):
        assert torch.equal(out, x + 2 * x + 2 * x)
    assert said == [
        *["a begins", "shared"],
        *["b begins", "shared"],
        *["a waited", "routed", "a begins"],
        *["b waited", "routed", "b begins"],
        "a waited",
        "b waited",
    ]


def _row(key, lane=0, **other):
    return Chunk(key, [5], 3, [0], is_sampled=True, lane=lane, **other)


def _keys(halves):
    return None if halves is None else tuple([chunk.key for chunk in half] for half in halves)


def test_a_decode_step_is_cut_in_the_middle_of_every_lane():
    rows = [_row(key, lane=key % 2) for key in range(7)]
    assert _keys(cut(rows, 2, 2)) == ([0, 2, 1], [4, 6, 3, 5])
    assert cut(rows, 2, 4) is None, "lane 1 has three rows"
    assert cut(rows, 3, 1) is None, "lane 2 has none"
    assert _keys(cut(rows[::2], 1, 4)) == ([0, 2], [4, 6])
    assert cut(rows[:1], 1, 1) is None


def test_rows_of_one_draft_stay_together():
    rows = [_row(key) for key in (0, 1, 1, 1, 2)]
    assert _keys(cut(rows, 1, 2)) == ([0], [1, 1, 1, 2])
    assert cut([_row(1)] * 5, 1, 2) is None


def test_a_step_with_a_prompt_in_it_is_not_cut():
    prompt = Chunk(9, [5, 6], 0, [0], is_sampled=False)
    assert cut([*(_row(key) for key in range(8)), prompt], 1, 2) is None


def test_a_process_alone_has_no_turns():
    alone = Ranks(ParallelLayout(), OneRank(), OneRank())
    assert with_two_batches(alone, 8) is alone


def test_ranks_that_would_cut_other_steps_refuse_each_other():
    layout = ParallelLayout.parse("tp2", "ep2")
    first, second = (Ranks(layout, rank, rank) for rank in RankThreads(2).ranks)
    other = OnThread(lambda: with_two_batches(second, 8))
    for call in (lambda: with_two_batches(first, 0), other.result):
        with pytest.raises(StartupError, match=r"--two-batch-rows is \[0, 8\], rank by rank"):
            call()
