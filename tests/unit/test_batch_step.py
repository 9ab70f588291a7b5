"""What a step is asked, what it costs, and the book that both schedulers keep of it."""

from dataclasses import replace

import pytest
from headrace_core.batch.scheduler import Load
from headrace_core.batch.step import Chunk, ForwardPlan, SamplingRow, StepPlan, step_load
from headrace_core.batch.step_book import Failed, StepBook
from headrace_core.errors import OverloadedError
from headrace_core.kv.page_pool import PageState
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SamplingParams
from headrace_core.roofline.step_load import StepLoad

ROW = SamplingRow(SamplingParams(seed=1), [1], [], 0, 1, (0,))


def chunk(count: int, start: int, is_sampled: bool = False) -> Chunk:
    return Chunk(1, [5] * count, start, [0], is_sampled)


def book(num_pages=4, max_waiting=2) -> StepBook[str]:
    return StepBook[str](PageAllocator(num_pages, 2), max_waiting_sequences=max_waiting)


def test_a_plan_counts_the_tokens_of_all_its_chunks():
    assert StepPlan(ForwardPlan([chunk(3, 0), chunk(1, 7)])).num_tokens == 4
    assert ForwardPlan([chunk(1, 0)]).zero_page_ids == []


@pytest.mark.parametrize(("num_chunks", "sizes"), [(1, (0, 1)), (2, (1, 1)), (3, (1, 2)), (4, (2, 2)), (5, (2, 3))])
def test_two_halves_do_what_the_whole_does_and_each_zeroes_its_own_pages(num_chunks, sizes):
    chunks = [Chunk(key, [5], 0, [10 * key, 10 * key + 1], key != 1) for key in range(num_chunks)]
    zeroed = [10 * key + 1 for key in range(num_chunks)]
    sampling = {chunk.key: replace(ROW, position=chunk.key) for chunk in chunks if chunk.is_sampled}
    first, second = StepPlan(ForwardPlan(chunks, zeroed, (1,)), sampling).halves()
    assert (len(first.chunks), len(second.chunks)) == sizes
    assert first.chunks + second.chunks == chunks
    for half in (first, second):
        assert half.forward.zero_page_ids == [chunk.page_ids[1] for chunk in half.chunks]
        assert half.sampling == {c.key: sampling[c.key] for c in half.chunks if c.is_sampled}
        assert half.forward.stops == ()


def test_a_booked_step_is_of_its_chunks_with_what_is_zeroed_before_and_where_it_stops():
    steps = book()
    assert steps.plan(ForwardPlan([], [3], (1, 2)), {}) is None
    forward = ForwardPlan([chunk(3, 0, True)], [3], (1, 2))
    plan = steps.plan(forward, {1: ROW})
    assert plan == StepPlan(forward, {1: ROW})
    assert steps.planned is plan


def test_a_chunks_error_names_its_request():
    error = Chunk(1, [5], 0, [0], False, "r-7").error(OverloadedError("NO_FREE_PAGES", "try again"))
    assert isinstance(error, OverloadedError)
    assert (error.reason, str(error)) == ("NO_FREE_PAGES", "request r-7: try again")


def test_one_token_after_a_cached_prefix_is_decode():
    assert step_load([chunk(1, 9, True)]) == StepLoad(
        num_sequences=1, num_logits=1, decode_tokens=1, decode_context=10, decode_pairs=10
    )


@pytest.mark.parametrize(("count", "start"), [(1, 0), (2, 0), (2, 9)])
def test_everything_else_is_prefill(count, start):
    load = step_load([chunk(count, start)])
    assert (load.prefill_tokens, load.prefill_context, load.decode_tokens) == (count, start + count, 0)
    assert load.prefill_pairs == count * start + count * (count + 1) / 2
    assert load.num_logits == 0


def test_one_token_after_one_cached_token_is_decode():
    assert step_load([chunk(1, 1)]).decode_context == 2


def test_a_step_costs_the_sum_of_its_chunks_and_logits_only_where_it_samples():
    load = step_load([chunk(1, 9, True), chunk(4, 2), chunk(1, 3, True)])
    assert (load.num_sequences, load.num_logits) == (3, 2)
    assert (load.decode_tokens, load.decode_context) == (2, 14)
    assert (load.prefill_tokens, load.prefill_context) == (4, 6)
    assert step_load([]) == StepLoad()


def test_events_are_told_once_and_in_order():
    b = book()
    b.tell("one")
    b.tell("two")
    assert list(b.take_events()) == ["one", "two"]
    assert list(b.take_events()) == []


def test_a_sequence_as_large_as_the_whole_pool_may_queue_and_a_larger_one_never():
    b = book(num_pages=4)
    assert b.admits(1, num_tokens=8, num_waiting=0)
    assert list(b.take_events()) == []
    assert not b.admits(2, num_tokens=9, num_waiting=0)
    (event,) = b.take_events()
    assert isinstance(event, Failed)
    assert event.key == 2
    assert isinstance(event.error, OverloadedError)
    assert event.error.reason == "NO_FREE_PAGES"
    assert "9 tokens take 5 pages, the whole pool has 4; raise --kv-pool-mib" in str(event.error)


def test_the_queue_takes_as_many_as_it_holds():
    b = book(max_waiting=2)
    assert b.admits(1, num_tokens=1, num_waiting=1)
    assert list(b.take_events()) == []
    assert not b.admits(2, num_tokens=1, num_waiting=2)
    assert not b.admits(3, num_tokens=1, num_waiting=3)
    events = b.take_events()
    assert [event.key for event in events if isinstance(event, Failed)] == [2, 3]
    assert [event.error.reason for event in events if isinstance(event, Failed)] == ["QUEUE_FULL"] * 2
    assert "2 sequences wait already" in str(events[0].error if isinstance(events[0], Failed) else "")


def test_a_planned_step_is_taken_once():
    b = book()
    with pytest.raises(AssertionError, match="no step is planned"):
        b.take_planned()
    plan = b.plan(ForwardPlan([chunk(1, 0)], [3]), {})
    assert plan == StepPlan(ForwardPlan([chunk(1, 0)], [3]))
    assert b.take_planned() is plan
    with pytest.raises(AssertionError, match="no step is planned"):
        b.take_planned()


def test_a_step_without_chunks_is_none_and_replaces_what_was_planned():
    b = book()
    b.plan(ForwardPlan([chunk(1, 0)]), {})
    assert b.plan(ForwardPlan([]), {}) is None
    with pytest.raises(AssertionError, match="no step is planned"):
        b.take_planned()


def test_the_load_counts_pages_that_can_be_had():
    b = book(num_pages=4)
    pages = b.pages.match(1, [])
    b.pages.reserve(pages, 4)
    b.pages.commit(pages, [1, 2, 3, 4], 2)
    load = b.load(num_running=1, num_waiting=2, num_waiting_tokens=3, num_sequences=4)
    counts = {PageState.FREE: 2, PageState.OWNED: 1, PageState.CACHED: 1, PageState.QUARANTINED: 0}
    assert load == Load(2, 1, 2, 3, 4, counts, most_free_pages=2)
    b.pages.free(pages)
    assert b.load(num_running=0, num_waiting=0, num_waiting_tokens=0, num_sequences=0).num_free_pages == 4


def test_pages_that_no_sequence_holds_are_noticed():
    b = book(num_pages=6)
    owned, moving = b.pages.match(1, []), b.pages.match(2, [])
    b.pages.reserve(owned, 4)
    b.pages.reserve(moving, 2)
    b.pages.quarantine(moving)
    b.pages.commit(owned, [1, 2, 3, 4], 2)
    b.check_integrity([owned, moving])
    for held in ([owned], [moving], []):
        with pytest.raises(AssertionError, match="pages without a sequence"):
            b.check_integrity(held)


def test_the_books_of_the_pool_are_checked_too():
    b = book()
    b.pages.pool._free[0].append(0)
    with pytest.raises(AssertionError, match="free twice"):
        b.check_integrity([])
