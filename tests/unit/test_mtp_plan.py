"""Drafts of the model's own module, as schedulers and executor see them: what is asked for, when, and what is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from headrace_core.batch.step import Chunk, StepPlan, StepResult
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.engine.executor import Executor
from headrace_core.engine.halves import Halves
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SampledToken, SamplingParams
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_decode.scheduler import DecodeScheduler
from headrace_decode.speculation import Drafting, Speculation, TokensToCome
from headrace_prefill.scheduler import PrefillScheduler
from pydantic import ValidationError

from tests.unit.decode_plan_parts import LIMITS, PAGE, prompt, spec

MTP = Speculation(3, 8, "mtp")


def scheduler(speculation: Speculation = MTP, *, max_step_tokens: int = 16, num_pages: int = 64) -> DecodeScheduler:
    return DecodeScheduler(
        PageAllocator(num_pages, PAGE),
        LIMITS,
        max_step_tokens=max_step_tokens,
        max_step_sequences=16,
        max_waiting_sequences=100,
        speculation=speculation,
    )


def step(s: DecodeScheduler, guesses: dict[int, list[int]] | None = None, *, token: int = 5) -> StepPlan:
    """Plan a step, and answer that every draft was right, with these guesses of what follows."""
    plan = s.plan(0.0)
    assert plan is not None
    given = {
        chunk.key: [SampledToken(t) for t in (*chunk.token_ids[len(chunk.token_ids) - chunk.num_draft :], token)]
        for chunk in plan.chunks
        if chunk.is_sampled
    }
    s.apply(StepResult(given, 0.0, guesses=guesses or {}), 0.0)
    s.check_integrity()
    return plan


def wanted(plan: StepPlan) -> list[int]:
    return [chunk.num_wanted for chunk in plan.chunks]


def test_the_end_of_a_prompt_asks_for_a_guess_and_the_next_step_checks_it():
    s = scheduler(max_step_tokens=4)
    s.add(1, spec([7, 8, 9, 10, 11, 12]), 0.0)
    first = step(s)
    assert (wanted(first), first.chunks[0].next_id) == ([0], 11), "the module has the token behind a prompt's chunk"
    last = step(s, {1: [20]})
    assert (wanted(last), last.chunks[0].next_id) == ([2], None)
    checked = s.plan(0.0)
    assert checked is not None
    assert (checked.chunks[0].token_ids, checked.chunks[0].num_draft) == ([5, 20], 1)


def test_a_guess_is_of_no_use_behind_other_tokens():
    come = TokensToCome([4, 5, 6], num_known=2)
    assert come.guess([1, 2], 2) == [4, 5]
    assert come.guess([1, 2, 3], 2) == []
    assert TokensToCome().guess([], 3) == []


def test_no_more_is_asked_for_than_the_next_step_may_check():
    s = scheduler()
    s.add(1, spec(prompt(1, 3), max_tokens=4), 0.0)
    s.add(2, spec(prompt(2, 3), max_tokens=2), 0.0)
    assert wanted(step(s, {1: [9, 9]})) == [2, 0], "one token is left when this one is there: nothing to guess"


def test_a_step_that_has_as_many_rows_as_drafts_pay_for_asks_for_none():
    s = scheduler(Speculation(3, 3, "mtp"))
    for key in (1, 2):
        s.add(key, spec(prompt(key, 3)), 0.0)
    plan = step(s)
    assert (wanted(plan), plan.forward.runs_mtp) == ([0, 0], True), "prompts have their rows all the same"
    assert not step(s).forward.runs_mtp, "what is turned down costs nothing"
    s.abort(2)
    plan = step(s)
    assert (wanted(plan), plan.forward.runs_mtp) == ([2], True)


def test_a_sequence_whose_guesses_are_wrong_asks_for_none_until_it_is_tried_again():
    drafting = Drafting(TokensToCome())
    assert drafting.num_wanted(1) == 1
    for _ in range(32):
        drafting.told([4], 7)
        assert drafting.guess([1] * 7, 1) == [4]
        drafting.judge(1, 0)
    assert drafting.num_wanted(1) == 0
    pauses = 0
    while not drafting.num_wanted(1):
        drafting.guess([1] * 7, 1)
        pauses += 1
    assert pauses == 16


def test_nothing_is_planned_ahead_of_a_step_that_guesses():
    s = scheduler()
    s.add(1, spec(prompt(1, 3)), 0.0)
    step(s)
    assert s.plan(0.0) is not None
    assert s.plan_ahead(0.0) is None


def test_prefill_workers_say_what_follows_a_chunk():
    s = PrefillScheduler(
        PageAllocator(16, PAGE),
        LIMITS,
        max_step_tokens=4,
        max_step_sequences=4,
        max_waiting_sequences=9,
        runs_mtp=True,
    )
    s.add(1, spec([7, 8, 9, 10, 11, 12]), 0.0)
    plan = s.plan(0.0)
    assert plan is not None
    assert (plan.forward.runs_mtp, plan.chunks[0].next_id) == (True, 11)
    s.apply(StepResult({}, 0.0), 0.0)
    plan = s.plan(0.0)
    assert plan is not None
    assert (plan.chunks[0].next_id, plan.chunks[0].num_wanted) == (None, 0)


@pytest.mark.parametrize(
    ("chunk", "given", "behind"),
    [
        (Chunk(1, [1, 2, 3], 0, [0], False, next_id=4), (), [2, 3, 4]),
        (Chunk(1, [1, 2, 3], 0, [0], False), (), [2, 3]),
        (Chunk(1, [1, 2, 3], 0, [0], True), (9,), [2, 3, 9]),
        (Chunk(1, [1, 2, 3], 0, [0], True), (), []),
        (Chunk(1, [1, 2, 3], 5, [0], True, num_draft=2), (2, 3, 9), [2, 3, 9]),
        (Chunk(1, [1, 2, 3], 5, [0], True, num_draft=2), (2, 8), [2, 8]),
        (Chunk(1, [1, 2, 3], 5, [0], True, num_draft=2), (7,), [7]),
    ],
)
def test_what_stands_behind_the_tokens_of_a_chunk(chunk, given, behind):
    assert chunk.behind(given) == behind


PROMPT = [7, 8, 9, 10, 11, 12, 13]


class Guessing:
    """A module that guesses `text`, and raises when it is called for an odd time, or always."""

    def __init__(self, text: Sequence[int] = (), *, is_broken: bool = False) -> None:
        self.num_calls = 0
        self._text = text
        self._is_broken = is_broken

    def guess(self, chunks, tokens, cache):
        self.num_calls += 1
        if self._is_broken or self.num_calls % 2:
            raise RuntimeError("the module is broken")
        (chunk,) = chunks
        at = chunk.start + 1 + len(chunk.behind(tokens[chunk.key])) - len(PROMPT)
        return {chunk.key: list(self._text[at : at + chunk.num_wanted])}


def run_to_the_end(guessing: Guessing | None) -> tuple[list[int], int]:
    """Return the tokens of a sequence with penalties, which the sampler keeps count of, and how many were drafted."""
    loaded = loaded_fake_model(num_pages=64, page_size=4, model=FakeModel())
    executor = Executor(loaded.model, loaded.cache, mtp=guessing)
    halves = Halves(executor.step, lambda: None, clock=lambda: 0.0)
    s = scheduler(MTP if guessing else Speculation())
    s.pages.page_size = 4
    params = SamplingParams(temperature=0.0, seed=1, max_tokens=30, repetition_penalty=1.9, frequency_penalty=1.9)
    s.add(1, replace(spec(PROMPT), params=params), 0.0)
    found: list[int] = []
    num_drafted = 0
    while plan := s.plan(0.0):
        result = halves.run(plan)
        assert not result.failures
        num_drafted += sum(chunk.num_draft for chunk in plan.chunks)
        found += [token.token_id for tokens in result.tokens.values() for token in tokens]
        s.apply(result, 0.0)
    return found, num_drafted


@pytest.mark.parametrize("is_broken", [True, False], ids=["always", "every other time"])
def test_a_module_that_raises_fails_no_sequence_and_changes_no_token(is_broken):
    plain, _ = run_to_the_end(None)
    guessing = Guessing(plain, is_broken=is_broken)
    found, num_drafted = run_to_the_end(guessing)
    assert found == plain
    assert guessing.num_calls > 8, "it was tried each time"
    assert (num_drafted > 5) != is_broken


@pytest.mark.parametrize(
    ("asked", "speculation"),
    [("mtp", Speculation(1, 2, "mtp")), ("mtp:3", Speculation(3, 2, "mtp")), ("lookup", Speculation(4, 8))],
)
def test_what_is_asked_for(asked, speculation):
    settings = DecodeSettings(model=Path("m"), speculate=asked)
    assert Speculation.of(settings) == speculation
    assert settings.has_mtp == speculation.is_mtp


def test_prefill_workers_take_the_same_option_but_look_nothing_up():
    assert PrefillSettings(model=Path("m"), speculate="mtp:2").has_mtp
    assert not PrefillSettings(model=Path("m")).has_mtp
    for wrong in ("lookup", "mtp:0", "mtp:10"):
        with pytest.raises(ValidationError, match="speculate"):
            PrefillSettings(model=Path("m"), speculate=wrong)
