"""The prefill scheduler keeps its budgets, its order and its pages, whatever is asked of it."""

from collections.abc import Iterable

from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import StepPlan, StepResult
from headrace_core.batch.step_book import Failed
from headrace_core.errors import HeadraceError
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import FinishReason, SampledToken, SamplingParams
from headrace_prefill.scheduler import Admitted, Prefilled, PrefillScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

LIMITS = ModelLimits(vocab_size=50, max_context_tokens=64, eos_token_ids=(0,))
PAGE = 4


def scheduler(num_pages=8, max_step_tokens=8, max_waiting=100, max_step_sequences=3) -> PrefillScheduler:
    return PrefillScheduler(
        PageAllocator(num_pages, PAGE),
        LIMITS,
        max_step_tokens=max_step_tokens,
        max_step_sequences=max_step_sequences,
        max_waiting_sequences=max_waiting,
    )


def spec(tokens: list[int], **params) -> SequenceSpec:
    return SequenceSpec("r", 1, 0, tokens, len(tokens), SamplingParams(seed=1, **params))


def answer(s: PrefillScheduler, plan: StepPlan, *, failing: Iterable[int] = ()) -> None:
    failures = {key: HeadraceError("BAD_LOGITS", "x") for key in failing}
    tokens = {c.key: SampledToken(5) for c in plan.chunks if c.sampling and c.key not in failures}
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
    assert [(c.start, len(c.token_ids), c.sampling is not None) for p in plans if p for c in p.chunks] == [
        (0, 8, False), (8, 8, False), (16, 3, True)
    ]  # fmt: skip
    _, event = s.take_events()
    assert isinstance(event, Prefilled)
    assert len(event.page_ids) == 5
    s.free(1)
    s.check_integrity()


def test_only_the_partial_last_page_is_zeroed():
    s = scheduler()
    s.add(1, spec([1] * 5), 0.0)
    plan = run(s)
    assert plan is not None
    assert plan.zero_page_ids == [plan.chunks[0].page_ids[1]]
    s.add(2, spec([2] * 8), 0.0)
    plan = run(s)
    assert plan is not None
    assert plan.zero_page_ids == []


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
    s.apply(StepResult({1: SampledToken(0), 2: SampledToken(9)}, 0.0), 0.0)
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
    first, second = [event for event in s.take_events() if not isinstance(event, Admitted)]
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
@given(OPERATIONS, st.integers(1, 12), st.integers(3, 9))
def test_budgets_hold_and_every_page_comes_back(operations, max_step_tokens, num_pages):
    s = scheduler(num_pages=num_pages, max_step_tokens=max_step_tokens)
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
            assert (chunk.sampling is not None) == (computed[chunk.key] == len(prompts[chunk.key]))
            assert len(chunk.page_ids) == s.pages.pages_for(len(prompts[chunk.key]))
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

    def counted(owner, token_ids):
        lengths.append(len(token_ids))
        return match(owner, token_ids)

    monkeypatch.setattr(s.pages, "match", counted)
    for _ in range(5):
        run(s)
    assert lengths == [16]
    s.free(1)
    plan = run(s)
    assert lengths == [16, 16]
    assert plan
    assert [chunk.key for chunk in plan.chunks] == [2]
