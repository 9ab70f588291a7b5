"""Which rows of a decode step get a draft, how long it is, and what it guesses, rule by rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from headrace_core.batch.step import StepPlan, StepResult
from headrace_core.config import DecodeSettings
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SampledToken
from headrace_decode.prompt_lookup import PromptLookup
from headrace_decode.scheduler import DecodeScheduler
from headrace_decode.speculation import Drafting, Speculation
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.unit.decode_plan_parts import LIMITS, PAGE, prompt, shares, spec

LOOP = [1, 2, 3, 1, 2, 3, 1, 2]


def scheduler(num_tokens: int = 4, max_rows: int = 16, *, num_pages: int = 32) -> DecodeScheduler:
    return DecodeScheduler(
        PageAllocator(num_pages, PAGE),
        LIMITS,
        max_step_tokens=16,
        max_step_sequences=16,
        max_waiting_sequences=100,
        speculation=Speculation(num_tokens, max_rows),
    )


def step(s: DecodeScheduler, *tokens: int) -> StepPlan:
    """Plan and answer a step; every sequence has as many of `tokens` as were drafted, and one more."""
    plan = s.plan(0.0)
    assert plan is not None
    given = {c.key: [SampledToken(t) for t in tokens[: 1 + c.num_draft]] for c in plan.chunks if c.is_sampled}
    s.apply(StepResult(given, 0.0), 0.0)
    s.check_integrity()
    return plan


def drafts(plan: StepPlan | None) -> list[list[int]]:
    assert plan is not None
    return [chunk.token_ids[len(chunk.token_ids) - chunk.num_draft :] for chunk in plan.chunks]


def looping(*keys: int, s: DecodeScheduler, length: int = 4, **params: object) -> DecodeScheduler:
    """Add sequences whose tokens are LOOP when their prompts are computed, and let their drafts be so long."""
    for key in keys:
        s.add(key, spec(LOOP[:-1], **params), 0.0)
    assert drafts(step(s, 2)) == [[]] * len(keys), "prompts have none"
    for key in keys:
        s._sequences[key].drafting.length = length
    return s


def test_a_draft_is_what_followed_and_goes_on_behind_what_was_right():
    s = looping(1, s=scheduler())
    plan = s.plan(0.0)
    assert (shares(plan), drafts(plan)) == ([(1, 7, 5)], [[3, 1, 2, 3]])
    s.apply(StepResult({1: [SampledToken(token) for token in (3, 1, 9)]}, 0.0), 0.0)
    sequence = s._sequences[1]
    assert sequence.token_ids == [*LOOP, 3, 1, 9]
    assert sequence.num_computed == 10, "the last is computed next, and where wrong guesses lay others come"
    assert shares(s.plan(0.0)) == [(1, 10, 1)]
    s.check_integrity()


def test_a_step_that_computes_a_prompt_has_no_drafts():
    s = looping(1, s=scheduler())
    s.add(2, spec(prompt(2, 5)), 0.0)
    assert drafts(step(s, 3)) == [[], []]


@pytest.mark.parametrize(("max_rows", "lengths"), [(2, [0, 0]), (3, [1, 0]), (7, [4, 1]), (16, [4, 4])])
def test_drafts_share_the_rows_that_are_left_the_oldest_first(max_rows, lengths):
    s = looping(1, 2, s=scheduler(max_rows=max_rows))
    assert [len(draft) for draft in drafts(s.plan(0.0))] == lengths


@pytest.mark.parametrize(("max_tokens", "length"), [(2, 0), (3, 1), (4, 2), (9, 4)])
def test_a_draft_leaves_room_for_the_last_token(max_tokens, length):
    """One is there already."""
    s = looping(1, s=scheduler(), max_tokens=max_tokens)
    assert [len(draft) for draft in drafts(s.plan(0.0))] == [length]


def test_a_draft_ends_before_a_token_that_ends_its_sequence():
    s = looping(1, s=scheduler(), stop_token_ids=(1,))
    assert drafts(s.plan(0.0)) == [[3]]


@pytest.mark.parametrize(("num_pages", "num_tokens", "length"), [(7, 4, 4), (6, 4, 0), (6, 2, 2), (5, 2, 0), (4, 1, 0)])
def test_a_draft_leaves_a_page_for_every_row(num_pages, num_tokens, length):
    """Eight tokens fill four pages; one or two tokens more take another page, three or four two."""
    s = looping(1, s=scheduler(num_tokens, num_pages=num_pages))
    assert [len(draft) for draft in drafts(s.plan(0.0))] == [length]
    s.check_integrity()


def test_wrong_drafts_become_short_and_then_none_and_right_ones_longer():
    drafting = Drafting()
    for length in (1, 2, 4):
        assert drafting.length == length
        drafting.judge(length, length)
    drafting.judge(8, 3)
    assert drafting.length == 3
    pauses: list[int] = []
    while len(pauses) < 3:
        drafting.judge(1, 0)
        assert drafting.length == 1
        if drafting.num_steps_off:
            pauses.append(drafting.num_steps_off)
            while drafting.num_steps_off:
                assert drafting.guess(LOOP, 4) == []
    assert pauses == [16, 32, 64]
    for _ in range(32):
        drafting.judge(1, 1)
    assert drafting.pause == 16


def expected(tokens: Sequence[int], count: int) -> list[int]:
    best, place = 1, -1
    for end in range(len(tokens) - 1):
        length = 0
        while length < min(8, end + 1) and tokens[end - length] == tokens[-1 - length]:
            length += 1
        if length >= max(best, 2):
            best, place = length, end
    return (list(tokens[place + 1 :]) * count)[:count] if place >= 0 else []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 9))
def test_a_guess_follows_the_last_place_of_the_most_of_the_newest_tokens(tokens, count):
    lookup = PromptLookup()
    for size in range(1, len(tokens) + 1):
        assert lookup.guess(tokens[:size], count) == expected(tokens[:size], count)


@pytest.mark.parametrize(
    ("asked", "most_sequences", "speculation"),
    [
        ("off", 64, Speculation(0, 0)),
        ("lookup", 64, Speculation(4, 8)),
        ("lookup:7", 64, Speculation(7, 8)),
        ("lookup:2", 5, Speculation(2, 5)),
    ],
)
def test_what_is_asked_for_is_a_number_of_tokens_and_of_rows(asked, most_sequences, speculation):
    settings = DecodeSettings(model=Path("m"), speculate=asked, max_step_sequences=most_sequences)
    assert Speculation.of(settings) == speculation


@pytest.mark.parametrize("asked", ["", "lookup:", "lookup:0", "lookup:100", "model", "lookup:x"])
def test_what_can_not_be_asked_for_is_refused(asked):
    with pytest.raises(ValidationError, match="speculate"):
        DecodeSettings(model=Path("m"), speculate=asked)
