"""Lanes of one worker: which one a sequence goes to, and that each keeps to its own pages."""

from collections.abc import Callable

import pytest
from headrace_core.batch.executor_book import ExecutorBook
from headrace_core.batch.step import Chunk, StepPlan, StepResult
from headrace_core.batch.step_book import Failed
from headrace_core.batch.step_budget import StepBudget
from headrace_core.batch.step_diff import Differ
from headrace_core.kv.page_pool import PagePool
from headrace_core.kv.sequence_pages import PageAllocator, SequencePages
from headrace_core.request import SampledToken
from headrace_decode.events import Output, PagesReady, Preempted
from headrace_decode.held_prefixes import PrefixHeld
from headrace_decode.scheduler import DecodeScheduler
from headrace_prefill.scheduler import PrefillScheduler

from tests.unit.decode_plan_parts import LIMITS, PAGE, prompt, spec, step


def pages_of(num_lanes: int, lane_pages: int) -> PageAllocator:
    return PageAllocator(num_lanes * lane_pages, PAGE, num_lanes=num_lanes, tells_cache=True)


def decode(num_lanes: int = 2, lane_pages: int = 8, max_step_tokens: int = 8) -> DecodeScheduler:
    return DecodeScheduler(
        pages_of(num_lanes, lane_pages),
        LIMITS,
        max_step_tokens=max_step_tokens,
        max_step_sequences=8,
        max_waiting_sequences=99,
    )


def prefill(num_lanes: int = 2, lane_pages: int = 8) -> PrefillScheduler:
    return PrefillScheduler(
        pages_of(num_lanes, lane_pages), LIMITS, max_step_tokens=8, max_step_sequences=8, max_waiting_sequences=99
    )


def answered(s: PrefillScheduler) -> list[Chunk]:
    """Plan and answer a step; return its chunks."""
    plan = s.plan(0.0)
    assert plan is not None, "nothing to compute"
    s.apply(StepResult({c.key: [SampledToken(5)] for c in plan.chunks if c.is_sampled}, 0.0), 0.0)
    return plan.chunks


def lanes(plan: StepPlan | None) -> dict[int, int]:
    return {chunk.key: chunk.lane for chunk in plan.chunks} if plan else {}


def taken(allocator: PageAllocator, owner: int, tokens: list[int]) -> SequencePages:
    pages = allocator.admit(owner, tokens)
    assert pages is not None, "there is room"
    allocator.commit(pages, tokens, len(tokens))
    return pages


def test_a_lane_has_the_ids_that_follow_the_lanes_before_it_and_no_other():
    pool = PagePool(6, 3)
    assert [pool.allocate(2, 7, lane) for lane in (1, 0, 2)] == [[2, 3], [0, 1], [4, 5]]
    pool.free([3, 4], 7)
    assert [pool.num_free_in(lane) for lane in range(3)] == [0, 1, 1]
    assert pool.allocate(1, 8, 1) == [3]
    with pytest.raises(AssertionError, match="as many pages each"):
        PagePool(7, 2)


def test_sequences_go_where_most_room_is():
    allocator = pages_of(2, 8)
    assert [taken(allocator, key, prompt(key, length)).lane for key, length in ((1, 8), (2, 4), (3, 2), (4, 4))] == [
        0, 1, 1, 1
    ]  # fmt: skip


def test_prompts_go_where_least_is_to_compute_though_what_is_held_there_leaves_less_room():
    s = prefill(lane_pages=16)
    s.add(1, spec(prompt(1, 8)), 0.0)
    assert [chunk.lane for chunk in answered(s)] == [0]
    # Computed, and held until it is handed off: lane 0 has less room than lane 1 with one of these.
    for key in (2, 3):
        s.add(key, spec(prompt(key, 4)), 0.0)
    assert {chunk.key: chunk.lane for chunk in answered(s)} == {2: 1, 3: 0}


def test_what_is_cached_draws_a_sequence_to_its_lane_and_is_found_in_no_other():
    allocator = pages_of(2, 16)
    first, other = taken(allocator, 1, prompt(1, 9)), taken(allocator, 2, prompt(2, 5))
    assert (first.lane, other.lane) == (0, 1)
    again = taken(allocator, 3, [*prompt(1, 9), 7])
    assert (again.lane, again.page_ids[:4]) == (0, first.page_ids[:4]), "though more room is in lane 1"
    assert not allocator.match(4, prompt(1, 9), lane=1).nodes
    assert allocator.match_longest(4, prompt(1, 9)).lane == 0
    assert allocator.num_cached_tokens(prompt(1, 9)) == 8


def test_a_beginning_that_all_share_does_not_draw_everybody_to_one_lane():
    """Half of a sequence must be cached to draw it, and only to a lane that is not twice as full as another."""
    allocator = pages_of(2, 64)
    short = [taken(allocator, key, [1] * PAGE + prompt(key, 4 * PAGE)).lane for key in range(10, 18)]
    assert short == [0, 1] * 4
    long = [taken(allocator, key, [2] * 6 * PAGE + prompt(key, PAGE)).lane for key in range(20, 28)]
    assert 2 <= long.count(0) <= 6


def test_a_sequence_is_refused_only_when_no_lane_has_room_and_looked_at_again_when_one_has():
    allocator = pages_of(2, 4)
    held = [taken(allocator, key, prompt(key, 6)) for key in (1, 2)]
    assert [pages.lane for pages in held] == [0, 1]
    tokens = prompt(3, 4)
    assert allocator.admit(3, tokens) is None
    assert all(allocator.is_refused(tokens, lane) for lane in (0, 1)), "two pages are free, one in each lane"
    allocator.free(held[1])
    assert [allocator.is_refused(tokens, lane) for lane in (0, 1)] == [True, False]
    found = allocator.admit(3, tokens)
    assert found
    assert found.lane == 1
    allocator.check_integrity()


def test_a_page_that_two_lanes_have_is_told_once_and_is_gone_with_the_last():
    allocator = pages_of(2, 4)
    both = []
    for lane in (0, 1):
        pages = allocator.match(lane, prompt(1, 2), lane=lane, num_left=0)
        allocator.reserve(pages, 2)
        allocator.commit(pages, prompt(1, 2), 2)
        both.append(pages)
    ((page, is_cached),) = allocator.take_cache_changes()
    assert is_cached
    allocator.discard(both[0])
    assert allocator.take_cache_changes() == []
    allocator.discard(both[1])
    assert allocator.take_cache_changes() == [(page, False)]


@pytest.mark.parametrize("make", [decode, prefill])
def test_a_sequence_must_fit_one_lane_and_is_told_so(
    make: Callable[[int, int], DecodeScheduler | PrefillScheduler],
):
    s = make(2, 4)
    s.add(1, spec(prompt(1, 9), max_tokens=1), 0.0)
    (failed,) = s.take_events()
    assert isinstance(failed, Failed)
    assert "each of 2 lanes has 4" in str(failed.error)
    assert failed.error.reason == "NO_FREE_PAGES"
    assert s.load().num_free_pages == 8
    assert s.load().most_free_pages == 4


def test_who_needs_a_page_takes_it_from_its_own_lane_and_an_empty_one_helps_nobody_who_runs():
    s = decode(lane_pages=4)
    for key, length in ((1, 3), (2, 3), (3, 2), (4, 1)):
        s.add(key, spec(prompt(key, length)), 0.0)
    assert lanes(step(s)) == {1: 0, 2: 1, 3: 0, 4: 1}
    s.abort(2)
    events = []
    while not any(isinstance(event, Preempted) for event in events):
        step(s)
        events += s.take_events()
        s.check_integrity()
    (gone,) = [event.key for event in events if isinstance(event, Preempted)]
    assert gone == 3, "the younger one of lane 0, though one of lane 1 is younger"
    s.abort(4)
    assert lanes(step(s)) == {1: 0, 3: 1}, "it is computed again where there is room"


def test_a_follower_knows_a_sequence_s_lane_by_its_pages_also_when_it_is_another():
    s = decode(lane_pages=4)
    differ, book = Differ(), ExecutorBook("of rank 1", lane_pages=4)
    for key, length in ((1, 3), (2, 3), (3, 2)):
        s.add(key, spec(prompt(key, length)), 0.0)
    seen: set[tuple[int, int]] = set()
    for number in range(6):
        plan = s.plan(0.0)
        assert plan is not None
        told = book.plan(differ.diff(plan, s.running_keys()))
        assert told.chunks == plan.chunks
        seen |= set(lanes(told).items())
        tokens = {c.key: [SampledToken(5)] for c in plan.chunks if c.is_sampled}
        s.apply(StepResult(tokens, 0.0), 0.0)
        book.sampled({key: [5] for key in tokens})
        if number == 1:
            s.abort(2)
    assert {(1, 0), (2, 1), (3, 0), (3, 1)} == seen


def test_more_sequences_than_lanes_hold_all_end_with_their_tokens_and_cancelled_ones_leave_nothing():
    s = decode(num_lanes=3, lane_pages=5, max_step_tokens=6)
    for key in range(1, 30):
        s.add(key, spec(prompt(key, 1 + key % 5), max_tokens=6), 0.0)
    outputs: dict[int, int] = {}
    seen: set[int] = set()
    for number in range(10_000):
        plan = s.plan(0.0)
        if plan is None:
            break
        seen |= {chunk.lane for chunk in plan.chunks}
        s.apply(StepResult({c.key: [SampledToken(5)] for c in plan.chunks if c.is_sampled}, 0.0), 0.0)
        if number in (3, 6, 9):
            s.abort(number)
        for event in s.take_events():
            if isinstance(event, Output):
                outputs[event.key] = outputs.get(event.key, 0) + 1
        s.check_integrity()
    assert seen == {0, 1, 2}
    assert all(count == 6 for key, count in outputs.items() if key not in (3, 6, 9))
    assert set(range(1, 30)) - {3, 6, 9} <= outputs.keys()
    assert s.load().num_free_pages == 15


def test_a_hand_off_has_all_its_pages_in_one_lane_and_what_is_held_for_others_too():
    s = decode()
    for key in (1, 2, 3):
        s.add(key, spec(prompt(key, 5)), 0.0, has_handoff=True)
    assert s.plan(0.0) is None
    ready = [event for event in s.take_events() if isinstance(event, PagesReady)]
    of_lanes = [{page_id // 8 for page_id in event.page_ids} for event in ready]
    assert of_lanes == [{0}, {1}, {0}]
    s.arrived(2, 5)
    s.prefixes.hold(9, prompt(2, 5), num_have_pages=0)
    (held,) = [event for event in s.take_events() if isinstance(event, PrefixHeld)]
    assert tuple(page_id for page_id, _ in held.pages) == ready[1].page_ids[:2]


def test_a_step_s_tokens_are_shared_out_and_what_a_lane_does_not_want_is_the_others():
    budget = StepBudget(8, [(0, 20), (1, 9), (1, 9)])
    assert (budget.left(0), budget.left(1)) == (4, 4)
    budget.take(0, 4)
    assert (budget.left(0), budget.left(1)) == (0, 4)
    budget.take(1, 4)
    assert budget.num_left == 0
    alone, beside_little = StepBudget(8, [(1, 20)]), StepBudget(8, [(0, 20), (1, 1)])
    assert (alone.left(1), beside_little.left(0), beside_little.left(1)) == (8, 7, 4)


def test_a_long_prompt_leaves_no_other_lane_idle_while_one_waits_or_runs_there():
    s = prefill(lane_pages=32)
    s.add(1, spec(prompt(1, 40)), 0.0)
    assert [(c.key, len(c.token_ids)) for c in answered(s)] == [(1, 8)], "alone it has the whole step"
    s.add(2, spec(prompt(2, 6)), 0.0)
    shares = [[(c.key, c.lane, len(c.token_ids)) for c in answered(s)] for _ in range(3)]
    assert shares == [[(1, 0, 4), (2, 1, 4)], [(1, 0, 6), (2, 1, 2)], [(1, 0, 8)]]
