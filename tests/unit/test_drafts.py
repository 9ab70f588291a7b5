"""Steps with drafts give the tokens that steps without give, whatever is drafted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import Chunk
from headrace_core.batch.step_book import Failed
from headrace_core.engine.executor import Executor
from headrace_core.engine.halves import Halves
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SampledToken, SamplingParams
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_decode.events import Output, Preempted
from headrace_decode.scheduler import DecodeScheduler
from headrace_decode.speculation import NO_DRAFTS, Drafting, Speculation
from hypothesis import given, settings
from hypothesis import strategies as st

PAGE_SIZE = 4
LIMITS = ModelLimits(vocab_size=97, max_context_tokens=32, eos_token_ids=(0, 5, 11, 17, 23))
KINDS = [
    SamplingParams(temperature=0.0, seed=1, max_tokens=9),
    SamplingParams(temperature=1.1, top_p=0.95, seed=2, max_tokens=12, min_tokens=4),
    SamplingParams(temperature=0.9, seed=3, max_tokens=20, repetition_penalty=1.3, presence_penalty=0.7),
    SamplingParams(temperature=1.0, seed=4, max_tokens=1),
    SamplingParams(temperature=1.0, seed=5, ignore_eos=True, logit_bias={3: 2.0}, top_logprobs=2, max_tokens=99),
    SamplingParams(temperature=0.8, seed=6, stop_token_ids=(2, 4, 6, 8, 10, 12), frequency_penalty=0.5, max_tokens=30),
]
Guess = Callable[[Sequence[int], int], list[int]]


def spec(key: int) -> SequenceSpec:
    tokens = [(13 * key + 5 * i) % 90 + 1 for i in range(1 + key % 7)]
    return SequenceSpec(f"r{key}", 1, 0, tokens, len(tokens), KINDS[key % len(KINDS)])


class Run:
    """Sequences 1 to `num_sequences`, to their ends."""

    def __init__(
        self,
        speculation: Speculation = NO_DRAFTS,
        *,
        num_sequences: int = 8,
        num_pages: int = 200,
        is_damaged: Callable[[Chunk], bool] = lambda chunk: False,
        raises: Callable[[Any], Exception | None] = lambda chunks: None,
    ) -> None:
        model = FakeModel(vocab_size=LIMITS.vocab_size)
        model.is_damaged, model.raises = is_damaged, raises
        loaded = loaded_fake_model(num_pages=num_pages, page_size=PAGE_SIZE, model=model)
        halves = Halves(Executor(model, loaded.cache).step, lambda: None, clock=lambda: 0.0)
        scheduler = DecodeScheduler(
            PageAllocator(num_pages, PAGE_SIZE),
            LIMITS,
            max_step_tokens=16,
            max_step_sequences=6,
            max_waiting_sequences=99,
            speculation=speculation,
        )
        for key in range(1, num_sequences + 1):
            scheduler.add(key, spec(key), 0.0)
        self.num_steps = self.num_drafted = self.num_right = 0
        while plan := scheduler.plan(0.0):
            result = halves.run(plan)
            drafted = [chunk for chunk in plan.chunks if chunk.num_draft]
            self.num_steps += 1
            self.num_drafted += sum(chunk.num_draft for chunk in drafted)
            self.num_right += sum(len(result.tokens.get(chunk.key, [0])) - 1 for chunk in drafted)
            scheduler.apply(result, 0.0)
            scheduler.check_integrity()
        self.num_preempted = 0
        self.outputs: dict[int, list[tuple[SampledToken, Any]]] = {}
        self.failures: dict[int, str] = {}
        for event in scheduler.take_events():
            match event:
                case Output(key, token, finish):
                    self.outputs.setdefault(key, []).append((token, finish))
                case Failed(key, error):
                    self.failures[key] = f"{error.reason} {error}"
                case Preempted():
                    self.num_preempted += 1
                case _:
                    pass

    def texts(self) -> list[list[int]]:
        """Return all tokens of every sequence."""
        return [spec(key).token_ids + [token.token_id for token, _ in output] for key, output in self.outputs.items()]


PLAIN = Run()


def guessing(right: float, seed: int = 0, texts: Sequence[list[int]] = ()) -> Guess:
    """Return who guesses so large a share of tokens right, and goes on behind a sequence's end."""
    texts, chance = texts or PLAIN.texts(), random.Random(seed)

    def guess(token_ids: Sequence[int], count: int) -> list[int]:
        known = list(token_ids)
        text = next(text for text in texts if text[: len(known)] == known)
        coming = (text[len(known) :] + [9] * count)[:count]
        return [token if chance.random() < right else (token + 1) % LIMITS.vocab_size for token in coming]

    return guess


@pytest.fixture
def guessed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Guess], None]:
    """Drafts are what this is given makes of them."""

    def use(guess: Guess) -> None:
        monkeypatch.setattr(Drafting, "guess", lambda _, token_ids, count: guess(token_ids, count))

    return use


@settings(max_examples=8, deadline=None)
@given(
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1 << 16),
    num_tokens=st.integers(1, 7),
    max_rows=st.integers(2, 30),
    num_pages=st.sampled_from([10, 16, 200]),
)
def test_tokens_are_the_same_whatever_is_drafted(right, seed, num_tokens, max_rows, num_pages):
    """Greedy and drawn, with penalties, bias, log-probabilities, least lengths, ends of all kinds, and pre-emption."""
    with pytest.MonkeyPatch.context() as patch:
        guess = guessing(right, seed)
        patch.setattr(Drafting, "guess", lambda _, token_ids, count: guess(token_ids, count))
        run = Run(Speculation(num_tokens, max_rows), num_pages=num_pages)
    assert run.outputs == PLAIN.outputs
    assert not run.failures


def test_right_drafts_save_steps_and_none_is_longer_than_its_sequence(guessed):
    guessed(guessing(1.0))
    run = Run(Speculation(3, 30))
    assert run.outputs == PLAIN.outputs
    assert run.num_steps < 0.45 * PLAIN.num_steps
    # Behind an end that nobody foresees, a token that is drawn, all are wrong.
    assert run.num_right > 0.9 * run.num_drafted


def test_it_holds_under_pre_emption(guessed):
    guessed(guessing(0.7))
    run = Run(Speculation(4, 30), num_pages=10)
    assert run.num_preempted
    assert run.outputs == PLAIN.outputs


@pytest.mark.parametrize("right", [0.0, 1.0])
@pytest.mark.parametrize("fails", ["damaged", "raises", "raises for drafts"])
def test_who_fails_fails_at_the_same_token_and_nobody_by_a_guess(guessed, fails, right):
    def is_damaged(chunk: Chunk) -> bool:
        return fails == "damaged" and chunk.key in (4, 8) and chunk.start > 6

    def raises(chunks: Sequence[Chunk]) -> Exception | None:
        is_there = any(chunk.key in (4, 8) and chunk.start > 6 for chunk in chunks)
        has_draft = len({chunk.key for chunk in chunks}) < len(chunks)
        is_so = is_there if fails == "raises" else has_draft
        return RuntimeError("broken") if fails != "damaged" and is_so else None

    plain = Run(is_damaged=is_damaged, raises=raises)
    guessed(guessing(right))
    run = Run(Speculation(3, 30), is_damaged=is_damaged, raises=raises)
    assert run.num_drafted
    assert run.outputs == plain.outputs
    assert run.failures == plain.failures
    assert set(run.failures) == (set() if fails == "raises for drafts" else {4, 8})
