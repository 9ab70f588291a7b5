"""Which sequences a decode step advances, and what is told of them, rule by rule."""

import pytest
from headrace_core.batch.step import SamplingRow, StepResult
from headrace_core.batch.step_book import Failed
from headrace_core.kv.page_pool import PageState
from headrace_core.request import FinishReason, SampledToken, SamplingParams
from headrace_decode.scheduler import Output, PagesReady, Started

from tests.unit.decode_plan_parts import handed_off, prompt, running, scheduler, shares, spec, step


def test_decode_rows_come_first_and_prompts_share_what_is_left_of_the_budget():
    s = scheduler(max_step_tokens=8)
    running(s, 3, 3)
    s.add(3, spec(prompt(3, 4)), 0.0)
    s.add(4, spec(prompt(4, 9)), 0.0)
    plan = step(s)
    assert [(key, count) for key, _, count in shares(plan)] == [(1, 1), (2, 1), (3, 4), (4, 2)]
    plan = step(s)
    assert [(key, count) for key, _, count in shares(plan)] == [(1, 1), (2, 1), (3, 1), (4, 5)]


def test_an_older_prompt_comes_after_a_younger_decode_row():
    s = scheduler(max_step_tokens=4)
    ready = handed_off(s, 2, [1, 2, 3])
    s.add(1, spec(prompt(1, 9)), 0.0)
    s.arrived(ready.key, 9)
    assert shares(step(s)) == [(2, 3, 1), (1, 0, 3)]


def test_two_tokens_still_to_compute_are_a_prompt_and_no_decode_row():
    s = scheduler(max_step_tokens=2)
    handed_off(s, 2, [7, 7, 7])
    s.arrived(2, 9)
    s.add(1, spec(prompt(1, 2)), 0.0)
    assert shares(step(s)) == [(2, 3, 1), (1, 0, 1)]


def test_a_spent_budget_leaves_the_rest_for_the_next_step():
    s = scheduler(max_step_tokens=4)
    s.add(1, spec(prompt(1, 4)), 0.0)
    s.add(2, spec(prompt(2, 3)), 0.0)
    assert shares(step(s)) == [(1, 0, 4)]
    assert shares(step(s)) == [(1, 4, 1), (2, 0, 3)]


@pytest.mark.parametrize(("max_step_tokens", "max_step_sequences", "most"), [(8, 3, 3), (2, 3, 2), (3, 3, 3)])
def test_so_many_run_as_a_step_can_advance(max_step_tokens, max_step_sequences, most):
    s = scheduler(max_step_tokens=max_step_tokens, max_step_sequences=max_step_sequences)
    for key in range(1, 6):
        s.add(key, spec([key]), 0.0)
    step(s)
    assert (s.load().num_running, s.load().num_waiting) == (most, 5 - most)


def test_sequences_under_transfer_count_as_running_for_admission():
    s = scheduler(max_step_sequences=2)
    handed_off(s, 1, [1, 2])
    s.add(2, spec([2]), 0.0)
    s.add(3, spec([3]), 0.0)
    assert [key for key, _, _ in shares(step(s))] == [2]
    s.abort(1)
    s.drained(1)
    assert [key for key, _, _ in shares(step(s))] == [2, 3]


def test_the_oldest_waits_at_the_head_of_the_queue_whatever_order_they_came_in():
    s = scheduler(max_step_sequences=1)
    for key in (3, 1, 2):
        s.add(key, spec([key]), 0.0)
    order = []
    for _ in range(3):
        ((key, _, _),) = shares(step(s))
        order.append(key)
        s.abort(key)
    assert order == [1, 2, 3]


def test_nobody_overtakes_a_sequence_that_waits_for_pages():
    s = scheduler(num_pages=6)
    running(s, 3)
    s.add(2, spec(prompt(2, 9)), 0.0)
    s.add(3, spec(prompt(3, 1)), 0.0)
    assert [key for key, _, _ in shares(step(s))] == [1]
    assert s.load().num_waiting == 2
    s.check_integrity()
    s.abort(1)
    assert [key for key, _, _ in shares(step(s))] == [2]


@pytest.mark.parametrize(("num_running", "num_reserved"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_at_admission_a_page_stays_free_for_every_four_that_run(num_running, num_reserved):
    for num_free, is_admitted in ((2 + num_reserved, True), (1 + num_reserved, False)):
        s = scheduler(num_pages=num_running + num_free, max_step_tokens=32, max_step_sequences=32)
        if num_running:
            running(s, *[1] * num_running)  # each holds a page: prompt and one token
        assert s.load().num_free_pages == num_free
        s.add(90, spec(prompt(90, 3)), 0.0, has_handoff=True)
        s.plan(0.0)
        assert any(isinstance(event, PagesReady) for event in s.take_events()) == is_admitted


def test_a_hand_off_gets_pages_for_what_comes_and_a_prompt_for_what_is_known():
    s = scheduler()
    assert len(handed_off(s, 1, [1, 2, 3, 4]).page_ids) == 2
    s.add(2, spec([5, 5, 5, 5]), 0.0)
    plan = s.plan(0.0)
    assert plan is not None
    assert len(plan.chunks[0].page_ids) == 2


@pytest.mark.parametrize(("local_below", "num_have_tokens"), [(0, 4), (1, 2)])
def test_a_hand_off_has_all_that_is_cached_here_unless_it_might_be_computed(local_below, num_have_tokens):
    s = scheduler()
    running(s, 4)
    s.add(2, spec(prompt(1, 4)), 0.0, has_handoff=True, local_below=local_below)
    s.plan(0.0)
    (ready,) = s.take_events()
    assert isinstance(ready, PagesReady)
    assert (len(ready.page_ids), ready.num_have_tokens) == (2, num_have_tokens)


def test_a_hand_off_that_waits_for_pages_joins_when_its_last_one_is_cached():
    s = scheduler(num_pages=3, max_step_tokens=2)
    s.add(1, spec(prompt(1, 4)), 0.0)
    step(s)
    s.add(2, spec(prompt(1, 4)), 0.0, has_handoff=True)
    step(s)
    assert s.load().num_waiting == 1
    assert not [event for event in s.take_events() if isinstance(event, PagesReady)], "one page is to stay free"
    s.plan(0.0)
    (ready,) = s.take_events()
    assert isinstance(ready, PagesReady)
    assert (ready.key, ready.num_have_tokens) == (2, 4)


def test_a_handed_off_sequence_says_how_long_it_waited_and_starts_with_its_first_token():
    s = scheduler()
    ready = handed_off(s, 7, [1, 2, 3], now=0.0)
    assert ready.queue_s == 0.0
    s.add(8, spec([4, 5, 6]), 2.0, has_handoff=True)
    s.plan(5.0)
    (ready,) = s.take_events()
    assert isinstance(ready, PagesReady)
    assert (ready.key, ready.queue_s) == (8, 3.0)
    s.arrived(8, 43)
    assert list(s.take_events()) == [Started(8, 3.0, 0)]
    plan = s.plan(9.0)
    assert plan is not None
    (chunk,) = plan.chunks
    assert (chunk.token_ids, chunk.start, chunk.page_ids[:2]) == ([43], 3, list(ready.page_ids))
    assert plan.sampling[8] == SamplingRow(
        params=SamplingParams(seed=1, max_tokens=50),
        prompt_token_ids=[4, 5, 6],
        output_token_ids=[43],
        sample_index=0,
        position=4,
        eos_token_ids=(0,),
    )


def test_a_chunk_names_its_request():
    s = scheduler()
    s.add(1, spec([1, 2, 3]), 0.0)
    assert [chunk.request_id for chunk in step(s).chunks] == ["r"]


def test_the_sampler_finds_what_it_kept_of_a_sequence_and_of_no_other():
    s = scheduler()
    running(s, 1, 1)
    first, second = ({key: row.memo for key, row in step(s).sampling.items()} for _ in range(2))
    assert [first[key] is second[key] for key in (1, 2)] == [True, True]
    assert first[1] is not first[2]
    assert first[1] is not None


def test_tokens_of_earlier_attempts_are_output_and_not_prompt():
    s = scheduler()
    s.add(1, spec([1, 2, 3, 4], num_output=2, sample_index=3), 0.0)
    plan = s.plan(0.0)
    assert plan is not None
    row = plan.sampling[1]
    assert (row.prompt_token_ids, row.output_token_ids, row.sample_index, row.position) == ([1, 2], [3, 4], 3, 4)


def test_pages_that_arrived_are_found_by_others():
    s = scheduler()
    handed_off(s, 1, [1, 2, 3, 4, 5])
    s.arrived(1, 9)
    s.add(2, spec([1, 2, 3, 4, 7]), 0.0)
    assert shares(step(s)) == [(1, 5, 1), (2, 4, 1)]
    assert Started(2, 0.0, 4) in s.take_events()


def test_pages_on_their_way_are_found_by_nobody():
    s = scheduler()
    handed_off(s, 1, [1, 2, 3, 4, 5])
    s.add(2, spec([1, 2, 3, 4, 7]), 0.0)
    assert shares(step(s)) == [(2, 0, 5)]


def test_a_sequence_arrives_once_and_only_if_it_is_on_its_way():
    s = scheduler()
    handed_off(s, 1, [1, 2, 3])
    s.add(2, spec([5, 5]), 0.0)
    for _ in range(2):
        s.arrived(1, 9)
        s.arrived(2, 9)
        s.arrived(99, 9)
    assert (s.load().num_running, s.load().num_waiting) == (1, 1)
    assert list(s.take_events()) == [Started(1, 0.0, 0)]
    s.check_integrity()


def test_an_aborted_transfer_is_freed_by_draining_and_by_nothing_else():
    s = scheduler(num_pages=4)
    handed_off(s, 1, [1, 2, 3])
    s.drained(1)
    assert s.load().page_counts[PageState.OWNED] == 2, "a transfer that goes on keeps its pages"
    s.abort(1)
    s.abort(1)
    s.arrived(1, 9)
    assert s.load().page_counts[PageState.QUARANTINED] == 2
    assert (s.load().num_waiting, s.load().num_running, s.load().num_sequences) == (0, 0, 1)
    s.drained(1)
    s.drained(1)
    assert s.load().num_free_pages == 4
    assert s.load().num_sequences == 0
    s.check_integrity()


def test_a_sequence_may_be_aborted_in_every_state():
    s = scheduler(max_step_sequences=1)
    s.add(1, spec(prompt(1, 3)), 0.0)
    s.add(2, spec(prompt(2, 3)), 0.0)
    step(s)
    s.abort(2)
    s.abort(1)
    s.abort(99)
    assert (s.load().num_sequences, s.load().num_free_pages) == (0, 32)
    assert s.plan(0.0) is None
    s.check_integrity()


def test_a_sequence_as_large_as_the_pool_but_for_its_next_token_is_refused_at_once():
    s = scheduler(num_pages=2)
    s.add(1, spec([1] * 3), 0.0)
    assert list(s.take_events()) == []
    s.add(2, spec([1] * 4), 0.0)
    (event,) = s.take_events()
    assert isinstance(event, Failed)
    assert (event.key, event.error.reason) == (2, "NO_FREE_PAGES")
    assert s.load().num_sequences == 1


def test_a_full_queue_refuses_by_name():
    s = scheduler(max_waiting=1)
    s.add(1, spec([1]), 0.0)
    s.add(2, spec([1]), 0.0)
    (event,) = s.take_events()
    assert isinstance(event, Failed)
    assert (event.key, event.error.reason) == (2, "QUEUE_FULL")
    assert s.load().num_sequences == 1


def test_every_sampled_token_is_told_and_the_last_one_frees_the_pages():
    s = scheduler()
    s.add(1, spec([1, 2], max_tokens=2), 0.0)
    s.add(2, spec([3, 4], max_tokens=9), 0.0)
    step(s, token=6)
    step(s, token=7)
    outputs = [event for event in s.take_events() if isinstance(event, Output)]
    assert outputs == [
        Output(1, SampledToken(6), None),
        Output(2, SampledToken(6), None),
        Output(1, SampledToken(7), FinishReason.LENGTH),
        Output(2, SampledToken(7), None),
    ]
    assert (s.load().num_sequences, s.load().num_running) == (1, 1)
    step(s, token=0)
    assert list(s.take_events()) == [Output(2, SampledToken(0), FinishReason.STOP)]
    assert s.load().num_free_pages == 32


def test_the_first_token_of_a_hand_off_counts_as_output():
    s = scheduler()
    handed_off(s, 1, [1, 2, 3, 4], max_tokens=2)
    s.arrived(1, 9)
    step(s)
    assert [event.finish for event in s.take_events() if isinstance(event, Output)] == [FinishReason.LENGTH]


def test_a_full_context_ends_a_sequence():
    s = scheduler(num_pages=64, max_step_tokens=64)
    s.add(1, spec(prompt(1, 58), max_tokens=50), 0.0)
    step(s)
    step(s)
    assert [event.finish for event in s.take_events() if isinstance(event, Output)] == [None, FinishReason.LENGTH]


def test_the_load_counts_prompts_still_to_compute_and_no_decode_rows():
    s = scheduler(max_step_tokens=4, max_step_sequences=3)
    handed_off(s, 1, [1, 2, 3])
    s.add(2, spec(prompt(2, 6)), 0.0)
    s.add(3, spec(prompt(3, 3)), 0.0)
    s.add(4, spec(prompt(4, 5)), 0.0)
    s.add(5, spec(prompt(5, 7)), 0.0, has_handoff=True)
    step(s)
    load = s.load()
    assert (load.num_running, load.num_waiting, load.num_sequences) == (2, 3, 5)
    assert load.num_waiting_tokens == 2 + 3 + 5, "of those that run and wait; a hand-off's are not computed here"
    s.arrived(1, 9)
    assert (s.load().num_running, s.load().num_waiting) == (3, 2)
    assert s.load().num_waiting_tokens == 2 + 3 + 5


def test_books_that_do_not_fit_are_noticed():
    s = scheduler(max_step_sequences=1)
    for key in (1, 2):
        s.add(key, spec(prompt(key, 3)), 0.0)
    step(s)
    s.check_integrity()
    s._num_transferring += 1
    with pytest.raises(AssertionError, match="transfers are miscounted"):
        s.check_integrity()
    s._num_transferring -= 1
    waiting = s._waiting.take()
    with pytest.raises(AssertionError, match="the waiting queue differs"):
        s.check_integrity()
    s._waiting.add(waiting)
    moved = s._running.pop()
    with pytest.raises(AssertionError, match="the running list differs"):
        s.check_integrity()
    s._running.append(moved)
    s.pages.pool.allocate(1, 9)
    with pytest.raises(AssertionError, match="pages without a sequence"):
        s.check_integrity()


def test_a_step_may_give_a_sequence_several_tokens_and_those_behind_its_last_never_were():
    s = scheduler()
    s.add(1, spec([1, 2, 3], max_tokens=3), 0.0)
    step(s, token=7)
    list(s.take_events())
    assert s.plan(0.0) is not None
    s.apply(StepResult({1: [SampledToken(8), SampledToken(9), SampledToken(10)]}, 0.0), 0.0)
    outputs = [event for event in s.take_events() if isinstance(event, Output)]
    assert [(event.token.token_id, event.finish) for event in outputs] == [(8, None), (9, FinishReason.LENGTH)]
    s.check_integrity()
