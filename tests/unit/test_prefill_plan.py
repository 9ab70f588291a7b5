"""Which prompts a prefill step computes, rule by rule, and what is told of them."""

import pytest
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import SamplingRow, StepPlan, StepResult
from headrace_core.batch.step_book import Failed
from headrace_core.errors import OverloadedError
from headrace_core.kv.page_pool import PageState
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import FinishReason, SampledToken, SamplingParams
from headrace_prefill.events import Admitted, Prefilled, Sealed
from headrace_prefill.scheduler import PrefillScheduler

LIMITS = ModelLimits(vocab_size=50, max_context_tokens=64, eos_token_ids=(0, 3))
PAGE = 4


def scheduler(num_pages=32, max_step_tokens=8, max_step_sequences=3, max_waiting=100) -> PrefillScheduler:
    return PrefillScheduler(
        PageAllocator(num_pages, PAGE),
        LIMITS,
        max_step_tokens=max_step_tokens,
        max_step_sequences=max_step_sequences,
        max_waiting_sequences=max_waiting,
    )


def spec(tokens: list[int], *, num_output=0, sample_index=0, **params) -> SequenceSpec:
    return SequenceSpec("r", 1, sample_index, tokens, len(tokens) - num_output, SamplingParams(seed=1, **params))


def prompt(key: int, length: int) -> list[int]:
    """Return a prompt that shares no page with another key's."""
    return [key] * length


def step(s: PrefillScheduler, *, planned_s=0.0, done_s=0.0, token=5) -> StepPlan:
    plan = s.plan(planned_s)
    assert plan is not None, "nothing to compute"
    s.apply(StepResult({c.key: [SampledToken(token)] for c in plan.chunks if c.is_sampled}, done_s - planned_s), done_s)
    return plan


def shares(plan: StepPlan) -> list[tuple[int, int, int]]:
    """Return (key, start, number of tokens) of each chunk."""
    return [(chunk.key, chunk.start, len(chunk.token_ids)) for chunk in plan.chunks]


def published(s: PrefillScheduler) -> list[Prefilled]:
    return [event for event in s.take_events() if isinstance(event, Prefilled)]


def test_the_token_budget_is_filled_to_the_last_token_and_never_beyond():
    s = scheduler(max_step_tokens=8)
    for key, length in ((1, 3), (2, 4), (3, 5)):
        s.add(key, spec(prompt(key, length)), 0.0)
    assert shares(step(s)) == [(1, 0, 3), (2, 0, 4), (3, 0, 1)]
    assert shares(step(s)) == [(3, 1, 4)]


def test_a_full_budget_admits_nobody():
    s = scheduler(max_step_tokens=8)
    s.add(1, spec(prompt(1, 8)), 0.0)
    s.add(2, spec(prompt(2, 1)), 0.0)
    assert shares(step(s)) == [(1, 0, 8)]
    assert s.load().num_waiting == 1
    assert shares(step(s)) == [(2, 0, 1)]


def test_a_step_computes_at_most_so_many_sequences():
    s = scheduler(max_step_sequences=2)
    for key in (1, 2, 3):
        s.add(key, spec(prompt(key, 2)), 0.0)
    assert shares(step(s)) == [(1, 0, 2), (2, 0, 2)]
    assert shares(step(s)) == [(3, 0, 2)]


def test_what_runs_goes_on_before_anything_is_admitted():
    s = scheduler(max_step_tokens=8)
    s.add(1, spec(prompt(1, 6)), 0.0)
    s.add(2, spec(prompt(2, 7)), 0.0)
    assert shares(step(s)) == [(1, 0, 6), (2, 0, 2)]
    s.add(3, spec(prompt(3, 9)), 0.0)
    assert shares(step(s)) == [(2, 2, 5), (3, 0, 3)]
    assert shares(step(s)) == [(3, 3, 6)]


def test_a_prompt_is_computed_to_its_end_before_the_next_one_begins():
    s = scheduler(max_step_tokens=4, max_step_sequences=1)
    for key in (1, 2):
        s.add(key, spec(prompt(key, 6)), 0.0)
    assert shares(step(s)) == [(1, 0, 4)]
    assert shares(step(s)) == [(1, 4, 2)]
    assert shares(step(s)) == [(2, 0, 4)]


def test_nobody_overtakes_a_prompt_that_waits_for_pages():
    s = scheduler(num_pages=4)
    s.add(1, spec(prompt(1, 8)), 0.0)
    step(s)
    s.add(2, spec(prompt(2, 12)), 0.0)
    s.add(3, spec(prompt(3, 4)), 0.0)
    assert s.plan(0.0) is None
    assert (s.load().num_waiting, s.load().num_running) == (2, 0)
    assert s.load().num_free_pages == 2, "an attempt to admit takes nothing"
    s.free(1)
    assert shares(step(s)) == [(2, 0, 8)]


def test_a_prompt_that_waits_for_pages_holds_up_nobody_before_it():
    s = scheduler(num_pages=4)
    s.add(1, spec(prompt(1, 6)), 0.0)
    s.add(2, spec(prompt(2, 12)), 0.0)
    assert shares(step(s)) == [(1, 0, 6)]


def test_a_prompt_that_waits_gives_back_what_it_found_in_the_cache():
    s = scheduler(num_pages=4)
    s.add(1, spec([1] * 4 + [2] * 4), 0.0)
    step(s)
    s.add(2, spec([1] * 4 + [3] * 9), 0.0)
    assert s.plan(0.0) is None
    s.free(1)
    assert s.load().num_free_pages == 4
    s.check_integrity()


def test_a_sequence_gets_the_pages_of_its_whole_prompt_at_once():
    s = scheduler(max_step_tokens=4)
    s.add(1, spec(prompt(1, 9)), 0.0)
    plan = s.plan(0.0)
    assert plan is not None
    assert len(plan.chunks[0].page_ids) == 3
    assert s.load().num_free_pages == 29


@pytest.mark.parametrize(("length", "is_zeroed"), [(4, False), (5, True), (7, True), (8, False)])
def test_the_last_page_is_zeroed_when_it_has_unused_slots(length, is_zeroed):
    s = scheduler()
    s.add(1, spec(prompt(1, length)), 0.0)
    plan = step(s)
    assert plan.forward.zero_page_ids == plan.chunks[0].page_ids[-1:] * is_zeroed


def test_the_last_page_of_every_prompt_in_a_step_is_zeroed():
    s = scheduler()
    s.add(1, spec(prompt(1, 5)), 0.0)
    s.add(2, spec(prompt(2, 2)), 0.0)
    plan = step(s)
    assert plan.forward.zero_page_ids == [chunk.page_ids[-1] for chunk in plan.chunks]
    assert len(plan.forward.zero_page_ids) == 2


def test_a_page_is_zeroed_once_however_many_steps_the_prompt_takes():
    s = scheduler(max_step_tokens=4)
    s.add(1, spec(prompt(1, 6)), 0.0)
    assert [len(step(s).forward.zero_page_ids) for _ in range(2)] == [1, 0]


def test_the_last_chunk_asks_for_the_token_after_everything_known():
    s = scheduler(max_step_tokens=4)
    s.add(1, spec([1, 2, 3, 4, 5, 6], num_output=2, sample_index=3, max_tokens=9), 0.0)
    assert step(s).sampling == {}
    assert step(s).sampling[1] == SamplingRow(
        params=SamplingParams(seed=1, max_tokens=9),
        prompt_token_ids=[1, 2, 3, 4],
        output_token_ids=[5, 6],
        sample_index=3,
        position=6,
        eos_token_ids=(0, 3),
    )


def test_a_chunk_names_its_request():
    s = scheduler()
    s.add(1, spec([1, 2, 3]), 0.0)
    assert [chunk.request_id for chunk in step(s).chunks] == ["r"]


def test_a_published_sequence_says_what_a_ticket_needs():
    s = scheduler()
    for key in (1, 2):  # the second finds the first's page, and its own is of the next generation
        s.add(key, spec([7] * 4 + [key] * 2), 1.0)
        step(s, planned_s=3.0, done_s=7.5)
        s.free(key) if key == 1 else None
    events = list(s.take_events())
    first, second = [event for event in events if isinstance(event, Prefilled)]
    assert [event for event in events if isinstance(event, Admitted)] == [Admitted(1, 0, 2.0), Admitted(2, 4, 2.0)]
    assert (first.key, first.token, first.finish) == (1, SampledToken(5), None)
    assert (first.token_ids, second.token_ids) == ([7, 7, 7, 7, 1, 1], [7, 7, 7, 7, 2, 2])
    assert first.compute_s == 4.5
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 4)
    assert (first.num_chunks, second.num_chunks) == (1, 1)
    sealed = [event for event in events if isinstance(event, Sealed)]
    one, two = sealed[0].pages
    assert [(event.key, event.first_page) for event in sealed] == [(1, 0), (2, 0), (2, 1)]
    assert [event.pages for event in sealed[1:]] == [(one,), ((two[0], two[1] + 1),)]
    assert (first.num_pages, second.num_pages) == (2, 2)


def test_waiting_is_counted_to_the_first_step_and_computing_from_there():
    s = scheduler(max_step_tokens=4)
    s.add(1, spec(prompt(1, 8)), 1.0)
    step(s, planned_s=2.0, done_s=3.0)
    step(s, planned_s=5.0, done_s=9.0)
    events = s.take_events()
    (event,) = [event for event in events if isinstance(event, Prefilled)]
    assert (events[0], event.compute_s, event.num_chunks) == (Admitted(1, 0, 1.0), 7.0, 2)


def test_rule_12_groups_take_turns_at_admission_and_within_one_the_oldest_goes_first():
    s = scheduler(max_step_sequences=1)
    for key, group in ((1, 7), (2, 7), (3, 7), (4, 8), (5, 8)):
        s.add(key, spec(prompt(key, 3)), 0.0, group=group)
    order = []
    while (plan := s.plan(0.0)) is not None:
        order += [chunk.key for chunk in plan.chunks]
        s.apply(StepResult({chunk.key: [SampledToken(5)] for chunk in plan.chunks}, 0.0), 0.0)
    assert order == [1, 4, 2, 5, 3]


@pytest.mark.parametrize(
    ("token", "num_output", "params", "finish"),
    [
        (5, 0, {}, None),
        (0, 0, {}, FinishReason.STOP),
        (3, 0, {}, FinishReason.STOP),
        (3, 2, {"min_tokens": 3}, None),
        (3, 2, {"min_tokens": 2}, FinishReason.STOP),
        (5, 2, {"max_tokens": 3}, FinishReason.LENGTH),
        (5, 2, {"max_tokens": 4}, None),
    ],
)
def test_a_first_token_may_be_the_last(token, num_output, params, finish):
    s = scheduler()
    s.add(1, spec([9, 9, 9, 9], num_output=num_output, **params), 0.0)
    step(s, token=token)
    assert [event.finish for event in published(s)] == [finish]


def test_a_first_token_that_fills_the_context_is_the_last():
    s = scheduler(num_pages=64, max_step_tokens=200)
    for key, length in ((1, 62), (2, 63)):
        s.add(key, spec(prompt(key, length)), 0.0)
    step(s)
    assert [event.finish for event in published(s)] == [None, FinishReason.LENGTH]


def test_what_is_computed_is_found_by_others_before_the_prompt_is_done():
    s = scheduler(max_step_tokens=8)
    s.add(1, spec([1] * 12), 0.0)
    step(s)
    s.add(2, spec([1] * 8 + [2]), 0.0)
    assert shares(step(s)) == [(1, 8, 4), (2, 8, 1)]


def test_the_load_counts_what_is_still_to_compute():
    s = scheduler(max_step_tokens=8, max_step_sequences=1)
    for key, length in ((1, 10), (2, 5), (3, 6)):
        s.add(key, spec(prompt(key, length)), 0.0)
    step(s)
    load = s.load()
    assert (load.num_running, load.num_waiting, load.num_sequences) == (1, 2, 3)
    assert load.num_waiting_tokens == 2 + 5 + 6
    assert load.num_free_pages == 29
    assert load.page_counts[PageState.CACHED] == 2
    step(s)
    load = s.load()
    assert (load.num_running, load.num_waiting, load.num_sequences) == (0, 2, 3)
    assert load.num_waiting_tokens == 5 + 6


def test_the_queue_and_the_pool_refuse_by_name_and_hold_nothing_of_it():
    s = scheduler(num_pages=2, max_waiting=1)
    s.add(1, spec(prompt(1, 9)), 0.0)
    s.add(2, spec(prompt(2, 8)), 0.0)
    s.add(3, spec(prompt(3, 1)), 0.0)
    failed = [event for event in s.take_events() if isinstance(event, Failed)]
    assert [(event.key, event.error.reason) for event in failed] == [(1, "NO_FREE_PAGES"), (3, "QUEUE_FULL")]
    assert all(isinstance(event.error, OverloadedError) for event in failed)
    assert s.load().num_sequences == 1
    assert shares(step(s)) == [(2, 0, 8)]


def test_a_sequence_may_go_at_any_time_and_another_takes_its_place():
    s = scheduler(max_step_tokens=4, max_step_sequences=1)
    for key in (1, 2, 3):
        s.add(key, spec(prompt(key, 6)), 0.0)
    step(s)
    s.free(1)
    s.free(2)
    s.free(99)
    assert s.load().num_sequences == 1
    assert shares(step(s)) == [(3, 0, 4)]
    step(s)
    s.free(3)
    assert (s.load().num_sequences, s.load().num_free_pages) == (0, 32)
    assert s.plan(0.0) is None
    s.check_integrity()


def test_books_that_do_not_fit_are_noticed():
    """Sequences: 1 is published, 2 runs, 3 and 4 wait."""
    damages = {
        "the waiting queue differs": lambda s: s._waiting.take(),
        "the running queue differs": lambda s: s._running.update({3: s._sequences[3]}),
        "a sequence is in two queues": lambda s: setattr(s._sequences[1], "state", None),
        "pages without a sequence": lambda s: s.pages.pool.allocate(1, 9),
    }
    for words, damage in damages.items():
        s = scheduler(max_step_tokens=8)
        for key in (1, 2, 3, 4):
            s.add(key, spec(prompt(key, 6)), 0.0)
        step(s)
        s.check_integrity()
        damage(s)
        with pytest.raises(AssertionError, match=words):
            s.check_integrity()
