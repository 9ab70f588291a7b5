"""The prefill scheduler keeps its budgets, its order and its pages, whatever is asked of it."""

from collections.abc import Iterable

from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import StepPlan, StepResult
from headrace_core.batch.step_book import Failed
from headrace_core.errors import HeadraceError
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import FinishReason, SampledToken, SamplingParams
from headrace_prefill.events import Admitted, Prefilled, Sealed
from headrace_prefill.scheduler import PrefillScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

LIMITS = ModelLimits(vocab_size=50, max_context_tokens=64, eos_token_ids=(0,))
PAGE = 4


def scheduler(num_pages=8, max_step_tokens=8, max_waiting=100, max_step_sequences=3, num_lanes=1) -> PrefillScheduler:
    return PrefillScheduler(
        PageAllocator(num_pages, PAGE, num_lanes=num_lanes),
        LIMITS,
        max_step_tokens=max_step_tokens,
        max_step_sequences=max_step_sequences,
        max_waiting_sequences=max_waiting,
    )


def spec(tokens: list[int], **params) -> SequenceSpec:
    return SequenceSpec("r", 1, 0, tokens, len(tokens), SamplingParams(seed=1, **params))


def answer(s: PrefillScheduler, plan: StepPlan, *, failing: Iterable[int] = ()) -> None:
    failures = {key: HeadraceError("BAD_LOGITS", "x") for key in failing}
    tokens = {c.key: [SampledToken(5)] for c in plan.chunks if c.is_sampled and c.key not in failures}
    s.apply(StepResult(tokens, 0.0, failures=failures), 0.0)


def run(s: PrefillScheduler, *, failing: Iterable[int] = ()) -> StepPlan | None:
    plan = s.plan(0.0)
    if plan:
        answer(s, plan, failing=failing)
    return plan


def test_a_long_prompt_is_computed_in_chunks_and_sampled_once():
    s = scheduler()
    s.add(1, spec(list(range(1, 20))), 0.0)
    plans = [run(s) for _ in range(4)]
    assert [(c.start, len(c.token_ids), c.is_sampled) for p in plans if p for c in p.chunks] == [
        (0, 8, False), (8, 8, False), (16, 3, True)
    ]  # fmt: skip
    events = s.take_events()
    (event,) = [event for event in events if isinstance(event, Prefilled)]
    assert event.num_pages == 5
    assert [(e.first_page, len(e.pages)) for e in events if isinstance(e, Sealed)] == [(0, 2), (2, 2), (4, 1)]
    s.free(1)
    s.check_integrity()


def sealed_pages(events, key: int) -> list[tuple[int, int]]:
    """Return what was sealed of a sequence, in order; no page is sealed twice, and none is left out."""
    pages: list[tuple[int, int]] = []
    for event in events:
        if isinstance(event, Sealed) and event.key == key:
            assert event.first_page == len(pages)
            pages += event.pages
    return pages


def test_rule_3_pages_are_sealed_once_and_are_those_that_were_planned_also_where_an_equal_one_was_cached_first():
    s = scheduler(num_pages=16, max_step_tokens=16)
    tokens = list(range(1, 15))
    planned: dict[int, list[int]] = {}
    for key in (1, 2):
        s.add(key, spec(tokens), 0.0)
    events = []
    while (plan := s.plan(0.0)) is not None:
        for chunk in plan.chunks:
            assert planned.setdefault(chunk.key, list(chunk.page_ids)) == list(chunk.page_ids)
        answer(s, plan)
        events += s.take_events()
    for key in (1, 2):
        assert [page_id for page_id, _ in sealed_pages(events, key)] == planned[key]
    assert not set(planned[1]) & set(planned[2])
    s.check_integrity()
    for key in (1, 2):
        s.free(key)
        s.check_integrity()
    assert s.load().num_free_pages == 16


def test_rule_4_cached_pages_are_sealed_at_admission_before_any_step():
    s = scheduler(num_pages=16)
    tokens = list(range(1, 10))
    s.add(1, spec(tokens), 0.0)
    while run(s):
        pass
    first = sealed_pages(s.take_events(), 1)
    s.add(2, spec(tokens), 0.0)
    plan = s.plan(0.0)
    events = s.take_events()
    assert [type(event) for event in events] == [Admitted, Sealed]
    assert sealed_pages(events, 2) == first[:2]
    assert plan is not None
    answer(s, plan)
    assert [(e.first_page, len(e.pages)) for e in s.take_events() if isinstance(e, Sealed)] == [(2, 1)]


def test_what_its_taker_has_is_not_sealed():
    s = scheduler()
    s.add(1, spec(list(range(1, 20))), 0.0, num_have_pages=3)
    while run(s):
        pass
    assert [(e.first_page, len(e.pages)) for e in s.take_events() if isinstance(e, Sealed)] == [(3, 1), (4, 1)]


def test_rule_8_what_a_sequence_computed_is_found_again_when_its_taker_left_halfway():
    s = scheduler(num_pages=16)
    tokens = list(range(1, 20))
    s.add(1, spec(tokens), 0.0)
    run(s)
    s.free(1)
    s.take_events()
    s.add(2, spec(tokens), 0.0)
    s.plan(0.0)
    assert [event.num_cached_tokens for event in s.take_events() if isinstance(event, Admitted)] == [8]


def test_rule_8_pages_that_stayed_a_sequences_own_are_cached_when_it_ends():
    """The second goes on where the first, whose equal pages were cached before, has ended."""
    s = scheduler(num_pages=32, max_step_tokens=32)
    short, long = list(range(1, 10)), list(range(1, 20))
    s.add(1, spec(short), 0.0)
    s.add(2, spec(long), 0.0)
    while run(s):
        pass
    for key in (1, 2):
        s.free(key)
    s.take_events()
    s.add(3, spec(long), 0.0)
    s.plan(0.0)
    assert [event.num_cached_tokens for event in s.take_events() if isinstance(event, Admitted)] == [16]
    s.check_integrity()


def test_a_sequence_that_ends_with_its_first_token_seals_no_more():
    s = scheduler()
    s.add(1, spec(list(range(1, 12)), max_tokens=1), 0.0)
    while run(s):
        pass
    events = s.take_events()
    assert [(e.first_page, len(e.pages)) for e in events if isinstance(e, Sealed)] == [(0, 2)]
    assert isinstance(events[-1], Prefilled)


def test_only_the_partial_last_page_is_zeroed():
    s = scheduler()
    s.add(1, spec([1] * 5), 0.0)
    plan = run(s)
    assert plan is not None
    assert plan.forward.zero_page_ids == [plan.chunks[0].page_ids[1]]
    s.add(2, spec([2] * 8), 0.0)
    plan = run(s)
    assert plan is not None
    assert plan.forward.zero_page_ids == []


def test_published_pages_are_held_until_freed():
    s = scheduler(num_pages=2)
    s.add(1, spec([1] * 8), 0.0)
    run(s)
    s.add(2, spec([2] * 8), 0.0)
    assert run(s) is None
    s.free(1)
    assert run(s) is not None


def test_a_prompt_that_can_never_fit_is_refused_at_once():
    s = scheduler(num_pages=2)
    s.add(1, spec([1] * 9), 0.0)
    (event,) = s.take_events()
    assert isinstance(event, Failed)
    assert event.error.reason == "NO_FREE_PAGES"


def test_a_full_queue_refuses():
    s = scheduler(max_waiting=1)
    s.add(1, spec([1]), 0.0)
    s.add(2, spec([1]), 0.0)
    (event,) = s.take_events()
    assert isinstance(event, Failed)
    assert event.error.reason == "QUEUE_FULL"


def test_a_first_token_that_ends_the_sequence_says_why():
    s = scheduler()
    s.add(1, spec([1]), 0.0)
    s.add(2, spec([1, 2], max_tokens=1), 0.0)
    plan = s.plan(0.0)
    assert plan is not None
    s.apply(StepResult({1: [SampledToken(0)], 2: [SampledToken(9)]}, 0.0), 0.0)
    assert [e.finish for e in s.take_events() if isinstance(e, Prefilled)] == [FinishReason.STOP, FinishReason.LENGTH]


def test_the_second_of_equal_prompts_computes_only_what_is_not_cached():
    s = scheduler()
    tokens = list(range(1, 10))
    s.add(1, spec(tokens), 0.0)
    while run(s):
        pass
    s.free(1)
    s.add(2, spec(tokens), 0.0)
    plan = run(s)
    assert plan is not None
    assert [(c.start, len(c.token_ids)) for c in plan.chunks] == [(8, 1)]
    events = s.take_events()
    assert [e.num_cached_tokens for e in events if isinstance(e, Prefilled)] == [0, 8]


def test_a_sequence_that_fails_in_a_step_ends_alone_and_what_it_computed_is_not_found_again():
    s = scheduler(num_pages=16, max_step_tokens=8)
    s.add(1, spec([1] * 9), 0.0)
    s.add(2, spec([2] * 5), 0.0)
    run(s)
    plan = run(s, failing=[1])
    assert plan is not None
    assert [c.key for c in plan.chunks] == [1, 2]
    first, second = [event for event in s.take_events() if not isinstance(event, Admitted | Sealed)]
    assert isinstance(first, Failed)
    assert (first.key, first.error.reason) == (1, "BAD_LOGITS")
    assert isinstance(second, Prefilled)
    s.check_integrity()
    s.add(3, spec([1] * 9), 0.0)
    plan = run(s)
    assert plan is not None
    assert [(c.key, c.start) for c in plan.chunks] == [(3, 0)], "the whole prompt is computed again"


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(1, 2), min_size=1, max_size=20)),
        st.tuples(st.just("free"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(0, 9)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(OPERATIONS, st.integers(1, 12), st.integers(3, 9), st.sampled_from([1, 1, 2, 3]))
def test_budgets_hold_and_every_page_comes_back(operations, max_step_tokens, lane_pages, num_lanes):
    num_pages = lane_pages * num_lanes
    s = scheduler(num_pages=num_pages, max_step_tokens=max_step_tokens, num_lanes=num_lanes)
    alive: set[int] = set()
    prompts: dict[int, list[int]] = {}
    computed: dict[int, int] = {}
    num_added = 0

    def step(num_failing: int) -> bool:
        plan = s.plan(0.0)
        if plan is None:
            return False
        assert 0 < plan.num_tokens <= max_step_tokens
        assert len(plan.chunks) <= 3
        for chunk in plan.chunks:
            assert chunk.token_ids == prompts[chunk.key][chunk.start : chunk.start + len(chunk.token_ids)]
            assert chunk.start >= computed.get(chunk.key, 0)
            computed[chunk.key] = chunk.start + len(chunk.token_ids)
            assert (chunk.is_sampled) == (computed[chunk.key] == len(prompts[chunk.key]))
            assert len(chunk.page_ids) == s.pages.pages_for(len(prompts[chunk.key]))
            assert {page_id // lane_pages for page_id in chunk.page_ids} == {chunk.lane}
        answer(s, plan, failing=[chunk.key for chunk in plan.chunks[:num_failing]])
        return True

    for name, value in operations:
        if name == "add":
            num_added += 1
            prompts[num_added] = value
            alive.add(num_added)
            s.add(num_added, spec(value), 0.0)
        elif name == "free":
            s.free(value)
            alive.discard(value)
        else:
            step(max(0, 3 - value))
        s.check_integrity()
        alive -= {event.key for event in s.take_events() if isinstance(event, Failed)}
        assert s.load().num_sequences == len(alive)
    for key in sorted(alive):
        # Publishing frees nothing: the oldest are released one by one, as leases end.
        while step(0):
            s.check_integrity()
        s.free(key)
    s.check_integrity()
    assert s.load().num_free_pages == num_pages
    assert s.load().num_sequences == 0


def test_the_queues_head_is_not_looked_for_in_the_cache_before_anything_changed(monkeypatch):
    s = scheduler(num_pages=8, max_step_tokens=8)
    s.add(1, spec(list(range(1, 25))), 0.0)
    run(s)
    s.add(2, spec(list(range(31, 47))), 0.0)
    lengths: list[int] = []
    match = s.pages.match

    def counted(owner, token_ids, **options):
        lengths.append(len(token_ids))
        return match(owner, token_ids, **options)

    monkeypatch.setattr(s.pages, "match", counted)
    for _ in range(5):
        run(s)
    assert lengths == [16]
    s.free(1)
    plan = run(s)
    assert lengths == [16, 16]
    assert plan
    assert [chunk.key for chunk in plan.chunks] == [2]
