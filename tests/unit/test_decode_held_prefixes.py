"""What others take of a decode worker's prefix cache stays as long as they read, and no longer."""

from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import StepResult
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SampledToken, SamplingParams
from headrace_decode.held_prefixes import PrefixHeld
from headrace_decode.scheduler import DecodeScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

LIMITS = ModelLimits(vocab_size=50, max_context_tokens=64, eos_token_ids=(0,))
PAGE = 2


def scheduler(num_pages=12) -> DecodeScheduler:
    pages = PageAllocator(num_pages, PAGE)
    return DecodeScheduler(pages, LIMITS, max_step_tokens=8, max_step_sequences=4, max_waiting_sequences=100)


def run(s: DecodeScheduler, key: int, tokens: list[int], max_tokens: int = 3) -> None:
    """Let a sequence run to its end; its output is all fives."""
    s.add(key, SequenceSpec("r", 1, 0, tokens, len(tokens), SamplingParams(seed=1, max_tokens=max_tokens)), 0.0)
    while step(s):
        pass


def step(s: DecodeScheduler) -> bool:
    plan = s.plan(0.0)
    if plan:
        s.apply(StepResult({c.key: [SampledToken(5)] for c in plan.chunks if c.is_sampled}, 0.0), 0.0)
    return plan is not None


def held(s: DecodeScheduler) -> list[PrefixHeld]:
    return [event for event in s.take_events() if isinstance(event, PrefixHeld)]


def test_what_is_cached_of_a_prefix_is_told_page_by_page_but_what_its_taker_has():
    s = scheduler()
    run(s, 1, [1, 2, 3])  # with 5, 5 of the output computed: [1, 2], [3, 5]
    for number, (tokens, num_have, num_tokens, num_pages) in enumerate(
        (
            ([1, 2, 3, 5], 0, 4, 2),
            ([1, 2, 3, 5, 5, 5], 0, 4, 2),
            ([1, 2, 3, 5], 1, 4, 1),
            ([1, 2, 3, 5], 2, 4, 0),
            ([1, 2, 9, 9], 2, 2, 0),
            ([1, 2, 3], 0, 2, 1),
            ([7, 7], 0, 0, 0),
        )
    ):
        s.prefixes.hold(number, tokens, num_have_pages=num_have)
        (event,) = held(s)
        assert (event.hold, event.num_tokens, len(event.pages)) == (number, num_tokens, num_pages)
        s.check_integrity()
    assert s.load().num_free_pages == 10, "two pages are held"
    for number in range(7):
        s.prefixes.let_go(number)
        s.prefixes.let_go(number)
    assert s.load().num_free_pages == 12
    s.check_integrity()


def test_a_held_page_is_not_evicted_for_anybody():
    s = scheduler(num_pages=6)
    run(s, 1, [1, 2, 3])
    s.prefixes.hold(1, [1, 2, 3, 5], num_have_pages=0)
    (event,) = held(s)
    run(s, 2, [9] * 5)
    for page_id, generation in event.pages:
        assert s.pages.pool.generation(page_id) == generation
    s.prefixes.let_go(1)
    run(s, 3, [8] * 7)
    assert any(s.pages.pool.generation(page_id) != generation for page_id, generation in event.pages)
    s.check_integrity()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(1, 2), min_size=1, max_size=6)),
        st.tuples(st.just("hold"), st.lists(st.sampled_from([1, 2, 5]), min_size=1, max_size=9)),
        st.tuples(st.sampled_from(["abort", "let_go"]), st.integers(0, 12)),
        st.tuples(st.just("step"), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(OPERATIONS, st.integers(5, 12))
def test_held_pages_keep_their_generations_and_all_come_back(operations, num_pages):
    s = scheduler(num_pages)
    num_holds = num_added = 0
    events: dict[int, PrefixHeld] = {}
    for name, value in operations:
        if name == "add":
            num_added += 1
            s.add(num_added, SequenceSpec("r", 1, 0, value, len(value), SamplingParams(seed=1, max_tokens=4)), 0.0)
        elif name == "hold":
            num_holds += 1
            s.prefixes.hold(num_holds, value, num_have_pages=num_holds % 2)
        elif name == "abort":
            s.abort(value)
        elif name == "let_go":
            s.prefixes.let_go(value)
            events.pop(value, None)
        else:
            step(s)
        events |= {event.hold: event for event in held(s)}
        s.check_integrity()
        for event in events.values():
            for page_id, generation in event.pages:
                assert s.pages.pool.generation(page_id) == generation
                assert s.pages.pool.references(page_id)
    for number in range(num_holds + 1):
        s.prefixes.let_go(number)
    while step(s):
        pass
    assert s.load().num_free_pages == num_pages
    s.check_integrity()
