"""A prompt whose beginning is cached elsewhere waits for it, holds up nobody, and is computed if it must be."""

import pytest
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import StepPlan, StepResult
from headrace_core.batch.step_book import FetchReady
from headrace_core.kv.page_pool import PageState
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SampledToken, SamplingParams
from headrace_prefill.scheduler import Admitted, Prefilled, PrefillScheduler, Sealed
from hypothesis import given, settings
from hypothesis import strategies as st

LIMITS = ModelLimits(vocab_size=50, max_context_tokens=64, eos_token_ids=(0,))
PAGE = 4


def scheduler(num_pages=16, max_step_tokens=8) -> PrefillScheduler:
    return PrefillScheduler(
        PageAllocator(num_pages, PAGE),
        LIMITS,
        max_step_tokens=max_step_tokens,
        max_step_sequences=3,
        max_waiting_sequences=100,
    )


def spec(tokens: list[int]) -> SequenceSpec:
    return SequenceSpec("r", 1, 0, tokens, len(tokens), SamplingParams(seed=1))


def run(s: PrefillScheduler) -> StepPlan | None:
    plan = s.plan(0.0)
    if plan:
        s.apply(StepResult({c.key: [SampledToken(5)] for c in plan.chunks if c.is_sampled}, 0.0), 0.0)
    return plan


def starts(plan: StepPlan | None) -> list[tuple[int, int]]:
    assert plan is not None
    return [(chunk.key, chunk.start) for chunk in plan.chunks]


TOKENS = list(range(1, 19))
"""Four full pages, and two tokens."""


def test_what_was_fetched_is_not_computed_and_is_sealed_and_cached_as_if_it_were():
    s = scheduler()
    s.add(1, spec(TOKENS), 0.0, num_cached_elsewhere=12)
    s.add(2, spec([30] * 5), 0.0)
    assert starts(run(s)) == [(2, 0)], "the next one goes on"
    ready, *_ = s.take_events()
    assert isinstance(ready, FetchReady)
    assert (len(ready.page_ids), ready.num_have_tokens) == (3, 0)
    load = s.load()
    assert (load.num_waiting, load.num_running, load.num_waiting_tokens) == (1, 0, 18)
    s.fetched(1, 12, 1.0)
    s.check_integrity()
    plan = run(s)
    assert starts(plan) == [(1, 12)]
    assert plan is not None
    assert plan.forward.zero_page_ids == plan.chunks[0].page_ids[-1:], "the page with unused slots"
    events = s.take_events()
    admitted, first, second = [event for event in events if isinstance(event, Admitted | Sealed)]
    assert isinstance(admitted, Admitted)
    assert (admitted.num_cached_tokens, admitted.queue_s) == (12, 1.0)
    assert [(e.first_page, len(e.pages)) for e in (first, second) if isinstance(e, Sealed)] == [(0, 3), (3, 2)]
    assert [e.num_cached_tokens for e in events if isinstance(e, Prefilled)] == [12]
    s.free(1)
    s.add(3, spec(TOKENS), 2.0, num_cached_elsewhere=12)
    assert starts(run(s)) == [(3, 16)], "what is here needs no fetching"


def test_what_did_not_come_is_computed():
    s = scheduler()
    s.add(1, spec(TOKENS), 0.0, num_cached_elsewhere=16)
    assert run(s) is None
    s.fetched(1, 0, 1.0)
    assert starts(run(s)) == [(1, 0)]
    s.fetched(1, 16, 1.0)
    assert starts(run(s)) == [(1, 8)], "too late a word changes nothing"


@pytest.mark.parametrize(
    ("num_tokens", "num_cached", "expected"),
    [(16, 8, None), (16, 11, None), (16, 12, 3), (16, 1 << 31, 3), (17, 1 << 31, 4)],
)
def test_only_what_is_missing_is_fetched_and_a_token_is_left_to_compute(
    num_tokens: int, num_cached: int, expected: int | None
):
    s = scheduler(max_step_tokens=32)
    s.add(1, spec(TOKENS[:9]), 0.0)
    run(s)
    s.free(1)
    s.take_events()
    s.add(2, spec(TOKENS[:num_tokens]), 0.0, num_cached_elsewhere=num_cached)
    run(s)
    ready = [event for event in s.take_events() if isinstance(event, FetchReady)]
    assert [(len(event.page_ids), event.num_have_tokens) for event in ready] == ([(expected, 8)] if expected else [])


def fetched(s: PrefillScheduler, num_left: int, num_prompts: int) -> None:
    """Add prompts 1, 2, ... of which the first page was fetched and so many tokens are left to compute."""
    for key in range(1, num_prompts + 1):
        s.add(key, spec([key] * (PAGE + num_left)), 0.0, num_cached_elsewhere=PAGE)
    assert s.plan(0.0) is None
    for key in range(1, num_prompts + 1):
        s.fetched(key, PAGE, 0.0)


def test_those_that_were_fetched_share_the_token_budget_oldest_first():
    s = scheduler(max_step_tokens=4)
    fetched(s, num_left=2, num_prompts=3)
    plan = run(s)
    assert starts(plan) == [(1, 4), (2, 4)], "nothing is left for the third"
    assert plan is not None
    assert plan.forward.zero_page_ids == [chunk.page_ids[-1] for chunk in plan.chunks], "the pages with unused slots"
    assert starts(run(s)) == [(3, 4)]


def test_of_those_that_were_fetched_a_step_computes_so_many_as_it_may():
    s = scheduler(max_step_tokens=8)
    fetched(s, num_left=1, num_prompts=4)
    assert starts(run(s)) == [(1, 4), (2, 4), (3, 4)]
    assert starts(run(s)) == [(4, 4)]


def test_pages_that_are_fetched_into_are_set_aside_until_nothing_can_land():
    s = scheduler()
    s.add(1, spec(TOKENS), 0.0, num_cached_elsewhere=16)
    s.plan(0.0)
    s.drained(1)
    s.free(1)
    s.free(1)
    assert s.load().page_counts[PageState.QUARANTINED] == 5
    s.fetched(1, 16, 0.0)
    s.check_integrity()
    assert s.plan(0.0) is None
    s.drained(1)
    assert (s.load().num_free_pages, s.load().num_sequences) == (16, 0)
    s.check_integrity()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=20), st.integers(0, 20))),
        st.tuples(st.sampled_from(["free", "drained"]), st.integers(1, 12)),
        st.tuples(st.just("fetched"), st.tuples(st.integers(1, 12), st.integers(0, 5))),
        st.tuples(st.just("step"), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(OPERATIONS, st.integers(1, 12), st.integers(4, 12))
def test_whatever_comes_or_not_every_prompt_is_computed_once_and_every_page_comes_back(operations, budget, num_pages):
    s = scheduler(num_pages=num_pages, max_step_tokens=budget)
    prompts: dict[int, list[int]] = {}
    reached: dict[int, int] = {}
    fetching: dict[int, FetchReady] = {}
    freed: set[int] = set()

    def take_events() -> None:
        for event in s.take_events():
            if isinstance(event, FetchReady):
                assert event.num_have_tokens < len(event.page_ids) * PAGE < len(prompts[event.key])
                fetching[event.key] = event

    def fetched(key: int, num_pages: int) -> None:
        ready = fetching.pop(key)
        num_tokens = min(num_pages, len(ready.page_ids)) * PAGE
        s.fetched(key, num_tokens if num_tokens > ready.num_have_tokens else 0, 0.0)
        s.drained(key)

    def step() -> bool:
        plan = s.plan(0.0)
        take_events()
        if plan is None:
            return False
        for chunk in plan.chunks:
            assert chunk.key not in fetching
            end = chunk.start + len(chunk.token_ids)
            assert chunk.token_ids == prompts[chunk.key][chunk.start : end] != []
            assert chunk.start >= reached.get(chunk.key, 0)
            reached[chunk.key] = end
        s.apply(StepResult({c.key: [SampledToken(5)] for c in plan.chunks if c.is_sampled}, 0.0), 0.0)
        take_events()
        return True

    for name, value in operations:
        if name == "add":
            key = len(prompts) + 1
            prompts[key] = value[0]
            s.add(key, spec(value[0]), 0.0, num_cached_elsewhere=value[1])
        elif name == "free":
            s.free(value)
            freed.add(value)
        elif name == "drained":
            if value in fetching and value in freed:
                s.drained(value)
                del fetching[value]
        elif name == "fetched":
            if value[0] in fetching:
                fetched(*value)
        else:
            step()
        take_events()
        s.check_integrity()
    for key in sorted(prompts):
        while step() or fetching:
            for waiting in sorted(fetching):
                fetched(waiting, waiting % 3)
            s.check_integrity()
        s.free(key)
    s.check_integrity()
    assert (s.load().num_sequences, s.load().num_free_pages) == (0, num_pages)
