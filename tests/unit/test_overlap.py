"""The engine that launches a step before the one under way is applied tells what its serial twin tells, of the same
trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import Chunk, FatalStepError, OnStop, StepPlan, StepResult
from headrace_core.engine.engine import Engine
from headrace_core.engine.executor import Executor
from headrace_core.engine.overlap import OverlappedEngine
from headrace_core.errors import HeadraceError
from headrace_core.kv.page_pool import PageState
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SampledToken, SamplingParams
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_decode.events import DecodeEvent, Output, Preempted
from headrace_decode.scheduler import DecodeScheduler

PAGE_SIZE = 4
LIMITS = ModelLimits(vocab_size=97, max_context_tokens=64, eos_token_ids=(0, 5, 11, 17, 23))
KINDS = [
    SamplingParams(temperature=0.0, seed=1, max_tokens=9),
    SamplingParams(temperature=1.1, top_p=0.95, seed=2, max_tokens=12, min_tokens=4),
    SamplingParams(temperature=0.9, seed=3, max_tokens=20, repetition_penalty=1.3, presence_penalty=0.7),
    SamplingParams(temperature=1.0, seed=4, max_tokens=1),
    SamplingParams(temperature=1.0, seed=5, ignore_eos=True, logit_bias={3: 2.0}, top_logprobs=2),
    SamplingParams(temperature=0.8, seed=6, stop_token_ids=(2, 4, 6, 8, 10, 12), frequency_penalty=0.5, max_tokens=30),
]


class Watched(DecodeScheduler):
    """Looks at every page that is named by a step under way, at every plan: it is the sequence's, or held for it."""

    num_ahead = 0

    def plan_ahead(self, now: float) -> StepPlan | None:
        named = {page_id for chunk in self._book.planned.chunks for page_id in chunk.page_ids}
        assert all(self.pages.pool.state(page_id) is not PageState.FREE for page_id in named), "a page was given back"
        plan = super().plan_ahead(now)
        if plan is not None:
            self.num_ahead += 1
            shared = {p for chunk in plan.chunks for p in chunk.page_ids[: chunk.start // PAGE_SIZE]}
            written = {p for chunk in plan.chunks for p in chunk.page_ids[chunk.start // PAGE_SIZE :]}
            keys = {chunk.key for chunk in self._book.planned.chunks}
            others = {p for chunk in plan.chunks if chunk.key not in keys for p in chunk.page_ids}
            own = {p for chunk in self._book.planned.chunks for p in chunk.page_ids[chunk.start // PAGE_SIZE :]}
            assert not others & own, "a page that a step under way writes was given to somebody else"
            assert not written & shared
        return plan


def spec(key: int) -> SequenceSpec:
    shared = [7, 8, 9, 1, 2, 3, 4, 6][: key % 9]
    tokens = shared + [(13 * key + 5 * i) % 90 + 1 for i in range(1 + key % 7)]
    return SequenceSpec(f"r{key}", 1, 0, tokens, len(tokens), KINDS[key % len(KINDS)])


async def events_of(
    kind: type[Engine[Any]],
    *,
    num_sequences: int,
    num_pages: int,
    damaged: Callable[[Chunk], bool] = lambda chunk: False,
    raises: Callable[[Any], Exception | None] = lambda chunks: None,
) -> tuple[dict[int, list[DecodeEvent]], Watched]:
    """Return what each sequence was told when all of them are over."""
    model = FakeModel(vocab_size=LIMITS.vocab_size)
    model.is_damaged, model.raises = damaged, raises
    loaded = loaded_fake_model(num_pages=num_pages, page_size=PAGE_SIZE, model=model)
    scheduler = Watched(
        PageAllocator(num_pages, PAGE_SIZE), LIMITS, max_step_tokens=16, max_step_sequences=6, max_waiting_sequences=99
    )
    told: dict[int, list[DecodeEvent]] = {}
    fatal: list[BaseException] = []

    def deliver(news: Any) -> None:
        for event in news.events:
            told.setdefault(event.key, []).append(event)

    engine = kind(
        scheduler, Executor(loaded.model, loaded.cache).step, deliver=deliver, on_fatal=fatal.append, clock=lambda: 0.0
    )
    engine.start()
    for key in range(1, num_sequences + 1):
        engine.submit(lambda scheduler, key=key: scheduler.add(key, spec(key), 0.0))
    await eventually(lambda: bool(fatal) or (len(told) == num_sequences and not scheduler._sequences), "all are over")
    await engine.stop()
    assert not fatal, fatal
    scheduler.check_integrity()
    return told, scheduler


def said(events: list[DecodeEvent]) -> list[str]:
    return [repr(event) for event in events if not isinstance(event, Preempted)]


@pytest.mark.parametrize("num_pages", [200, 24], ids=["pages for all", "pre-emption"])
@async_test
async def test_every_event_of_both_is_the_same(num_pages: int):
    serial, _ = await events_of(Engine, num_sequences=24, num_pages=num_pages)
    found, scheduler = await events_of(OverlappedEngine, num_sequences=24, num_pages=num_pages)
    assert found.keys() == serial.keys()
    for key, events in serial.items():
        # Who waits for pages finds another number of them cached: in which step is not part of the promise.
        tokens = [[e for e in of if isinstance(e, Output)] for of in (events, found[key])]
        assert tokens[0] == tokens[1], key
        if num_pages == 200:
            assert said(events) == said(found[key])
    assert scheduler.num_ahead > 20, "steps were planned ahead"
    finishes = [event.finish for events in serial.values() for event in events if isinstance(event, Output)]
    assert len({finish for finish in finishes if finish}) == 2, "some ended by a token, some by length"


@pytest.mark.parametrize("fails", ["damaged", "raises"])
@async_test
async def test_what_fails_in_one_fails_in_the_other_and_nobody_else_does(fails: str):
    def damaged(chunk: Chunk) -> bool:
        return fails == "damaged" and chunk.key in (3, 8) and chunk.start > 6

    def raises(chunks: Any) -> Exception | None:
        is_there = any(chunk.key in (3, 8) and chunk.start > 6 for chunk in chunks)
        return RuntimeError("broken") if fails == "raises" and is_there else None

    serial, _ = await events_of(Engine, num_sequences=12, num_pages=200, damaged=damaged, raises=raises)
    found, _ = await events_of(OverlappedEngine, num_sequences=12, num_pages=200, damaged=damaged, raises=raises)
    assert {key: said(events) for key, events in found.items()} == {key: said(of) for key, of in serial.items()}
    assert any("Failed" in event for event in said(serial[8]))


@async_test
async def test_a_device_that_is_lost_is_fatal_in_the_thread_that_computes():
    fatal: list[BaseException] = []

    def lost(plan: StepPlan, on_stop: OnStop | None) -> StepResult:
        raise FatalStepError("device")

    scheduler = Watched(PageAllocator(9, 4), LIMITS, max_step_tokens=9, max_step_sequences=2, max_waiting_sequences=9)
    engine = OverlappedEngine(scheduler, lost, deliver=lambda news: None, on_fatal=fatal.append)
    engine.start()
    engine.submit(lambda scheduler: scheduler.add(1, spec(1), 0.0))
    await eventually(lambda: bool(fatal), "the engine died")
    assert isinstance(fatal[0], FatalStepError)
    await engine.stop()


def ahead(**options: Any) -> Watched:
    """Return a scheduler whose first step, of sequence 1, is under way."""
    numbers = {"max_step_tokens": 9, "max_step_sequences": 4, "max_waiting_sequences": 9, **options}
    scheduler = Watched(PageAllocator(numbers.pop("num_pages", 9), PAGE_SIZE), LIMITS, **numbers)
    scheduler.add(1, SequenceSpec("r1", 1, 0, [1, 2, 3], 3, SamplingParams(seed=1, max_tokens=4)), 0.0)
    assert scheduler.plan(0.0) is not None
    return scheduler


def result(token: int = 9) -> StepResult:
    return StepResult({1: [SampledToken(token)]}, 0.0)


def test_pages_of_who_ends_while_a_step_names_them_are_nobodys_until_that_is_applied():
    s = ahead()
    plan = s.plan_ahead(0.0)
    assert plan is not None
    (chunk,) = plan.chunks
    assert (chunk.token_ids, chunk.start) == ([-1], 3), "a token that is coming"
    s.apply(result(token=0), 0.0)
    assert [event.finish is not None for event in s.take_events() if isinstance(event, Output)] == [True]
    s.check_integrity()
    assert s.pages.pool.num_free == 8, "held"
    s.apply(result(), 0.0)
    assert not [event for event in s.take_events() if isinstance(event, Output)], "in vain"
    assert s.pages.pool.num_free == 9
    s.check_integrity()


def test_an_aborted_sequences_pages_wait_for_all_steps_that_name_them():
    s = ahead()
    assert s.plan_ahead(0.0) is not None
    s.abort(1)
    s.apply(result(), 0.0)
    assert s.pages.pool.num_free == 8
    s.apply(result(), 0.0)
    assert s.pages.pool.num_free == 9


def test_who_is_sure_to_end_by_length_has_no_row_in_vain():
    s = ahead()
    for _ in range(3):
        assert s.plan_ahead(0.0) is not None
        s.apply(result(), 0.0)
    assert s.plan_ahead(0.0) is None, "the last of four tokens is coming"
    s.apply(result(), 0.0)
    assert not s._sequences


def tokens_of(plan: StepPlan | None) -> StepResult:
    assert plan is not None
    return StepResult({chunk.key: [SampledToken(9)] for chunk in plan.chunks if chunk.is_sampled}, 0.0)


def test_nobody_is_pre_empted_while_a_step_is_under_way():
    s = ahead(num_pages=3)
    s.add(2, SequenceSpec("r2", 1, 0, [5, 6, 7], 3, SamplingParams(seed=1, max_tokens=9)), 0.0)
    s.apply(result(), 0.0)
    plan = s.plan(0.0)
    following = s.plan_ahead(0.0)
    assert following is not None
    assert [chunk.key for chunk in following.chunks] == [1, 2], "one of them took the last page"
    s.apply(tokens_of(plan), 0.0)
    assert s.plan_ahead(0.0) is None, "the other one needs another"
    assert not [event for event in s.take_events() if isinstance(event, Preempted)]
    s.apply(tokens_of(following), 0.0)
    s.check_integrity()
    assert s.plan(0.0) is not None
    assert [event.key for event in s.take_events() if isinstance(event, Preempted)] == [2]


def test_an_equal_page_that_was_cached_first_does_not_take_the_place_of_one_that_a_step_names():
    s = ahead(max_step_tokens=32)
    for key in (2, 3):
        s.add(key, SequenceSpec(f"r{key}", 1, 0, [4, 4, 4, 4, 4], 5, SamplingParams(seed=1, max_tokens=9)), 0.0)
    s.apply(result(), 0.0)
    plan, following = s.plan(0.0), s.plan_ahead(0.0)
    assert following is not None
    assert len(following.chunks) == 3
    named = {chunk.key: list(chunk.page_ids) for chunk in following.chunks}
    s.apply(tokens_of(plan), 0.0)
    assert {key: s._sequences[key].pages.page_ids for key in named} == named
    s.check_integrity()


def test_nobody_finds_pages_of_one_that_failed_while_a_step_names_them():
    s = ahead(max_step_tokens=32)
    s.abort(1)
    s.apply(result(), 0.0)
    prompt = [4, 4, 4, 4, 4, 4]
    s.add(2, SequenceSpec("r2", 1, 0, prompt, 6, SamplingParams(seed=1, max_tokens=9)), 0.0)
    plan, following = s.plan(0.0), s.plan_ahead(0.0)
    s.apply(tokens_of(plan), 0.0)
    last = s.plan_ahead(0.0)
    s.apply(StepResult({}, 0.0, failures={2: HeadraceError("BAD_LOGITS", "x")}), 0.0)
    s.add(3, SequenceSpec("r3", 1, 0, prompt, 6, SamplingParams(seed=1, max_tokens=9)), 0.0)
    assert s.plan_ahead(0.0) is None, "the step under way comes first"
    assert following is not None
    s.apply(tokens_of(last), 0.0)
    plan = s.plan(0.0)
    assert plan is not None
    assert [(chunk.key, chunk.start) for chunk in plan.chunks] == [(3, 0)], "the prompt is computed again"
    s.check_integrity()
