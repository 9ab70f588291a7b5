"""A sequence that goes on at another decode worker: set aside here with its pages, fetched there."""

import pytest
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import StepResult
from headrace_core.batch.step_book import FetchReady
from headrace_core.kv.page_pool import PageState
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SampledToken, SamplingParams
from headrace_decode.events import Output, PagesReady, Started
from headrace_decode.held_prefixes import PrefixHeld
from headrace_decode.scheduler import DecodeScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

LIMITS = ModelLimits(vocab_size=50, max_context_tokens=64, eos_token_ids=(0,))
PAGE = 2


def scheduler(num_pages=20) -> DecodeScheduler:
    pages = PageAllocator(num_pages, PAGE)
    return DecodeScheduler(pages, LIMITS, max_step_tokens=8, max_step_sequences=4, max_waiting_sequences=100)


def add(s: DecodeScheduler, key: int, tokens: list[int], *, max_tokens=8, **more) -> None:
    s.add(key, SequenceSpec("r", 1, 0, tokens, len(tokens), SamplingParams(seed=1, max_tokens=max_tokens)), 0.0, **more)


def step(s: DecodeScheduler) -> list[tuple[int, int, int]]:
    """Make a step, whose output is fives; return (key, start, number of tokens) of each chunk."""
    plan = s.plan(0.0)
    if plan is None:
        return []
    s.apply(StepResult({c.key: [SampledToken(5)] for c in plan.chunks if c.is_sampled}, 0.0), 0.0)
    s.check_integrity()
    return [(c.key, c.start, len(c.token_ids)) for c in plan.chunks]


def told(s: DecodeScheduler, kind):
    return [event for event in s.take_events() if isinstance(event, kind)]


def test_what_is_set_aside_is_planned_no_more_and_keeps_its_pages_until_it_is_let_go():
    s = scheduler()
    add(s, 1, [1, 2, 3, 4, 6])
    add(s, 2, [9, 9, 9])
    step(s)
    step(s)
    s.set_aside(1)
    s.set_aside(1)
    s.take_events()
    assert [key for key, _, _ in step(s)] == [2]
    assert {event.key for event in told(s, Output)} == {2}
    s.check_integrity()
    assert s.load().num_running == 1
    assert s.load().page_counts[PageState.OWNED] > 0, "its last page too"
    s.prefixes.hold(7, [1, 2, 3, 4, 6, 5], num_have_pages=0)
    s.abort(1)
    s.abort(2)
    s.prefixes.let_go(7)
    assert s.load().num_free_pages == 20
    s.check_integrity()


def test_what_waits_is_set_aside_without_pages_and_what_is_on_its_way_is_not():
    s = scheduler(num_pages=4)
    add(s, 1, [1, 2, 3, 4, 6])
    add(s, 2, [9] * 5)
    step(s)
    s.set_aside(2)
    s.set_aside(5)
    s.abort(1)
    assert step(s) == [], "nothing is left to compute"
    s.abort(2)
    add(s, 3, [1, 2, 7], has_handoff=True)
    s.admit(0.0)
    s.set_aside(3)
    (ready,) = told(s, PagesReady)
    s.arrived(3, 5)
    assert step(s) == [(3, 3, 1)]
    assert ready.num_have_tokens == 2
    s.abort(3)
    assert s.load().num_free_pages == 4


@pytest.mark.parametrize(
    ("num_tokens", "has_handoff", "local_below", "expected"),
    [
        (4, True, 2, "computed"),
        (4, False, 0, "computed"),
        (4, True, 0, "handed off"),
        (2, True, 2, "handed off"),
        (0, True, 2, "handed off"),
        (0, False, 2, "computed"),
    ],
)
def test_what_was_fetched_is_as_if_it_had_been_cached_here(num_tokens, has_handoff, local_below, expected):
    s = scheduler()
    add(s, 1, [1, 2, 3, 4, 6], has_handoff=has_handoff, local_below=local_below, num_cached_elsewhere=5)
    assert step(s) == []
    (ready,) = told(s, FetchReady)
    assert (ready.key, len(ready.page_ids), ready.num_have_tokens) == (1, 2, 0), "a token is left to compute"
    assert s.load().num_waiting == 1
    s.fetched(1, num_tokens, 0.0)
    s.fetched(1, num_tokens, 0.0)
    s.check_integrity()
    events = s.take_events()
    s.prefixes.hold(1, [1, 2, 3, 4], num_have_pages=0)
    (held,) = told(s, PrefixHeld)
    assert held.num_tokens == num_tokens, "others find it too"
    s.prefixes.let_go(1)
    if expected == "computed":
        (started,) = [event for event in events if isinstance(event, Started)]
        assert started.num_cached_tokens == 0, "of what is here"
        assert step(s) == [(1, num_tokens, 5 - num_tokens)]
    else:
        (asked,) = [event for event in events if isinstance(event, PagesReady)]
        assert (len(asked.page_ids), asked.num_have_tokens) == (3, num_tokens)
        s.arrived(1, 5)
        assert step(s) == [(1, 5, 1)]
    s.abort(1)
    assert s.load().num_free_pages == 20


def test_what_is_cached_here_is_not_fetched():
    s = scheduler()
    add(s, 1, [1, 2, 3, 4, 6], max_tokens=1)
    step(s)
    add(s, 2, [1, 2, 3, 4, 7], num_cached_elsewhere=4)
    s.take_events()
    assert step(s) == [(2, 4, 1)]
    assert not told(s, FetchReady)
    add(s, 3, [1, 2, 3, 4, 7, 5, 5, 5], num_cached_elsewhere=8)
    step(s)
    (ready,) = told(s, FetchReady)
    assert (len(ready.page_ids), ready.num_have_tokens) == (3, 4)
    s.abort(3)
    assert s.load().page_counts[PageState.QUARANTINED] == 2, "bytes may still land in what is not shared"
    s.fetched(3, 6, 0.0)
    assert s.load().page_counts[PageState.QUARANTINED] == 2
    s.drained(3)
    s.check_integrity()


def test_what_did_not_come_is_computed_after_what_is_cached_here():
    s = scheduler()
    add(s, 1, [1, 2, 3, 4, 6], max_tokens=1)
    step(s)
    add(s, 2, [1, 2, 3, 4, 7, 8, 9], num_cached_elsewhere=6)
    assert step(s) == []
    s.fetched(2, 0, 0.0)
    assert step(s) == [(2, 4, 3)]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(1, 2), min_size=1, max_size=6)),
        st.tuples(st.sampled_from(["abort", "drained", "set_aside", "arrived"]), st.integers(1, 12)),
        st.tuples(st.just("fetched"), st.tuples(st.integers(1, 12), st.integers(0, 3))),
        st.tuples(st.just("step"), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(OPERATIONS, st.integers(5, 12))
def test_whatever_happens_no_page_is_lost_and_nothing_aside_is_computed(operations, num_pages):
    s = scheduler(num_pages)
    num_added = 0
    aside: set[int] = set()
    fetching: dict[int, FetchReady] = {}
    for name, value in operations:
        if name == "add":
            num_added += 1
            add(s, num_added, value, has_handoff=num_added % 3 == 0, local_below=2, num_cached_elsewhere=4)
        elif name == "fetched":
            key, num_fetched = value
            ready = fetching.pop(key, None)
            if ready is not None:
                num_tokens = min(num_fetched, len(ready.page_ids)) * PAGE
                s.fetched(key, num_tokens, 0.0)
                s.drained(key)
        elif name == "arrived":
            s.arrived(value, 5)
        elif name == "step":
            assert aside.isdisjoint(key for key, _, _ in step(s))
        else:
            if name == "drained" and value in fetching:
                continue  # it is not
            getattr(s, name)(value)
            if name == "set_aside" and value in s._sequences and s._sequences[value].state.value == "aside":
                aside.add(value)
        fetching |= {event.key: event for event in told(s, FetchReady)}
        s.check_integrity()
    for key in range(1, num_added + 1):
        s.abort(key)
        s.drained(key)
    assert s.load().num_free_pages == num_pages
    s.check_integrity()
