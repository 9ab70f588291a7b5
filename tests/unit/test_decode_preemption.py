"""Who gives way when a decode step runs out of pages, and how it goes on, rule by rule."""

from headrace_core.batch.step_book import Failed, FetchReady
from headrace_core.errors import OverloadedError
from headrace_decode.events import Output, PagesReady, Preempted, Started

from tests.unit.decode_plan_parts import handed_off, prompt, running, scheduler, shares, spec, step


def test_the_youngest_gives_way_and_goes_on_where_it_was():
    s = scheduler(num_pages=4, max_step_tokens=8)
    running(s, 2, 2)  # three tokens in two pages each
    step(s)
    plan = s.plan(0.0)
    assert shares(plan) == [(1, 4, 1)]
    assert list(s.take_events())[-1:] == [Preempted(2)]
    load = s.load()
    assert (load.num_running, load.num_waiting) == (1, 1)
    assert load.num_waiting_tokens == 5, "all its tokens are computed again"
    s.check_integrity()


def test_it_gives_way_to_others_it_is_not_the_end_of_the_step_for():
    """The oldest decode row takes the youngest one's page; a prompt of an age between them is computed all the same."""
    s = scheduler(num_pages=7, max_step_tokens=4)
    running(s, 2)
    handed_off(s, 3, [7, 7])
    s.arrived(3, 9)
    s.add(2, spec(prompt(2, 6)), 0.0)
    step(s)
    assert s.load().num_free_pages == 0, "two, two and three pages"
    plan = s.plan(0.0)
    assert [key for key, _, _ in shares(plan)] == [1, 2]
    assert Preempted(3) in s.take_events()


def test_a_row_that_gives_way_itself_leaves_the_rest_of_the_step_to_others():
    """Two decode rows, of which the younger needs a page that nobody younger has; the prompt goes on without it."""
    s = scheduler(num_pages=6, max_step_tokens=3)
    handed_off(s, 1, [7, 7, 7])
    handed_off(s, 3, [8, 8])
    s.add(2, spec(prompt(2, 6)), 0.0)
    step(s)
    assert s.load().num_free_pages == 0
    s.arrived(1, 9)
    s.arrived(3, 9)
    assert shares(s.plan(0.0)) == [(1, 3, 1), (2, 3, 2)]
    assert Preempted(3) in s.take_events()


def test_a_pre_empted_sequence_waits_for_pages_for_all_its_tokens():
    s = scheduler(num_pages=6, max_step_tokens=8)
    running(s, 2, 2)
    for _ in range(4):
        step(s)
    assert (s.load().num_waiting, s.load().num_free_pages) == (1, 2), "its seven tokens take four"
    s.take_events()
    for _ in range(2):
        step(s)
        assert s.load().num_waiting == 1
    assert {type(event) for event in s.take_events()} == {Output}, "it does not come and go"


def test_a_sequence_may_grow_to_the_whole_pool_if_younger_ones_give_way():
    s = scheduler(num_pages=3)
    handed_off(s, 2, [8])
    s.add(1, spec(prompt(1, 4)), 0.0)
    step(s)
    s.arrived(2, 9)
    assert s.load().num_free_pages == 0
    assert shares(step(s)) == [(1, 4, 1)]
    assert [type(event) for event in s.take_events() if not isinstance(event, Output)] == [Started, Started, Preempted]


def test_a_pre_empted_sequence_is_not_started_twice():
    s = scheduler(num_pages=4, max_step_tokens=8)
    running(s, 2, 2)
    step(s)
    step(s, now=1.0)
    s.abort(1)
    plan = step(s, now=9.0)
    assert [(key, start) for key, start, _ in shares(plan)] == [(2, 2)], "its full page was still cached"
    assert not [event for event in s.take_events() if isinstance(event, Started)]


def test_a_sequence_that_was_handed_off_is_computed_here_after_it_gave_way():
    s = scheduler(num_pages=4, max_step_tokens=8)
    s.add(1, spec(prompt(1, 2)), 0.0)
    step(s)
    handed_off(s, 2, [7, 7])
    s.arrived(2, 9)
    while not any(isinstance(event, Preempted) for event in s.take_events()):
        step(s)
    s.abort(1)
    plan = s.plan(0.0)
    assert [(chunk.key, chunk.token_ids[-3:]) for chunk in plan.chunks if plan] == [(2, [9, 5, 5])]
    assert not [event for event in s.take_events() if isinstance(event, PagesReady)]


def test_what_was_fetched_or_not_is_computed_here_after_it_gave_way():
    s = scheduler(num_pages=5)
    running(s, 3)
    s.add(2, spec([7, 7, 7]), 0.0, num_cached_elsewhere=2)
    for _ in range(2):
        step(s)
    assert [event.key for event in s.take_events() if isinstance(event, FetchReady)] == [2]
    s.fetched(2, 0, 0.0)
    assert [key for key, _, _ in shares(step(s))] == [1], "it takes the younger one's page"
    s.abort(1)
    assert shares(step(s)) == [(2, 0, 3)]
    events = s.take_events()
    assert Preempted(2) in events
    assert not [event for event in events if isinstance(event, FetchReady)], "it was asked for once"


def test_a_sequence_that_fills_the_pool_alone_ends_with_an_error_that_says_so():
    s = scheduler(num_pages=2)
    s.add(1, spec([1, 2, 3]), 0.0)
    step(s)
    step(s)
    s.take_events()
    assert s.plan(0.0) is None
    (event,) = s.take_events()
    assert isinstance(event, Failed)
    assert event.key == 1
    assert isinstance(event.error, OverloadedError)
    assert event.error.reason == "NO_FREE_PAGES"
    assert str(event.error) == "5 tokens take 3 pages, the whole pool has 2; raise --kv-pool-mib"
    assert (s.load().num_sequences, s.load().num_free_pages) == (0, 2)


def test_pages_that_one_gave_up_are_used_in_the_same_step():
    s = scheduler(num_pages=3)
    s.add(1, spec([1, 2, 3, 4]), 0.0)
    s.add(2, spec([5, 6, 7, 8]), 0.0)
    for _ in range(3):
        step(s)
    assert s.load().num_waiting == 1
    assert shares(s.plan(0.0)) == [(2, 0, 4)], "the first outgrew the pool"
    assert [type(event) for event in s.take_events() if not isinstance(event, Output)] == [Started, Failed, Started]
