"""The decode scheduler neither loses nor repeats a token, and keeps its budgets and pages, whatever is asked of it."""

from collections.abc import Iterable

from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import ForwardPlan, StepPlan, StepResult
from headrace_core.batch.step_book import Failed
from headrace_core.errors import HeadraceError
from headrace_core.kv.page_pool import PageState
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import FinishReason, SampledToken, SamplingParams
from headrace_decode.scheduler import DecodeScheduler, Output, PagesReady, Preempted, Started
from hypothesis import given, settings
from hypothesis import strategies as st

LIMITS = ModelLimits(vocab_size=1000, max_context_tokens=40, eos_token_ids=(0,))
PAGE = 2


def scheduler(num_pages=16, max_step_tokens=8, max_step_sequences=4, max_waiting=100, num_lanes=1) -> DecodeScheduler:
    return DecodeScheduler(
        PageAllocator(num_pages, PAGE, num_lanes=num_lanes),
        LIMITS,
        max_step_tokens=max_step_tokens,
        max_step_sequences=max_step_sequences,
        max_waiting_sequences=max_waiting,
    )


def spec(tokens: list[int], max_tokens: int = 6, **params) -> SequenceSpec:
    return SequenceSpec("r", 1, 0, tokens, len(tokens), SamplingParams(seed=1, max_tokens=max_tokens, **params))


def next_token(known: list[int]) -> int:
    """Stand for a model: a function of every token before, never end-of-sequence."""
    return hash(tuple(known)) % 999 + 1


def answer(s: DecodeScheduler, plan: StepPlan, *, failing: Iterable[int] = ()) -> None:
    """Compute a plan, reading each sequence's tokens as a model would: prompt and output of its sampling row."""
    failures = {key: HeadraceError("BAD_LOGITS", "x") for key in failing}
    tokens = {
        key: [SampledToken(next_token(row.prompt_token_ids + row.output_token_ids))]
        for key, row in plan.sampling.items()
        if key not in failures
    }
    s.apply(StepResult(tokens, 0.0, failures=failures), 0.0)


def run_all(s: DecodeScheduler) -> dict[int, list[int]]:
    outputs: dict[int, list[int]] = {}
    while plan := s.plan(0.0):
        answer(s, plan)
        for event in s.take_events():
            if isinstance(event, Output):
                outputs.setdefault(event.key, []).append(event.token.token_id)
        s.check_integrity()
    return outputs


def expected(tokens: list[int], count: int) -> list[int]:
    known = list(tokens)
    for _ in range(count):
        known.append(next_token(known))
    return known[len(tokens) :]


def test_a_local_prompt_is_chunked_and_then_decoded():
    s = scheduler(max_step_tokens=4)
    s.add(1, spec([1, 2, 3, 4, 5, 6]), 0.0)
    assert run_all(s) == {1: expected([1, 2, 3, 4, 5, 6], 6)}


def test_a_handed_off_sequence_runs_once_its_pages_arrived_and_does_not_repeat_the_first_token():
    s = scheduler()
    s.add(1, spec([1, 2, 3]), 0.0, has_handoff=True)
    assert s.plan(0.0) is None
    (ready,) = s.take_events()
    assert isinstance(ready, PagesReady)
    assert len(ready.page_ids) == 2
    s.arrived(1, 9)
    plan = s.plan(0.0)
    assert plan is not None
    assert [(c.token_ids, c.start) for c in plan.chunks] == [([9], 3)]
    assert [type(e) for e in s.take_events()] == [Started]
    answer(s, plan)
    assert run_all(s)[1] == expected([1, 2, 3, 9], 5)


def test_an_aborted_transfer_keeps_its_pages_until_drained():
    s = scheduler()
    s.add(1, spec([1, 2, 3]), 0.0, has_handoff=True)
    s.plan(0.0)
    s.abort(1)
    assert s.load().page_counts[PageState.QUARANTINED] == 2
    s.arrived(1, 9)
    assert s.plan(0.0) is None
    s.drained(1)
    assert s.load().num_free_pages == 16
    s.check_integrity()


def test_rule_11_what_lacks_few_enough_tokens_is_computed_here_and_the_cache_is_asked_when_it_is_its_turn():
    s = scheduler()
    s.add(1, spec([1, 2, 3, 4, 5], max_tokens=1), 0.0)
    s.add(2, spec([1, 2, 3, 4, 6], max_tokens=2), 0.0, has_handoff=True, local_below=1)
    s.add(3, spec([1, 2, 7, 7, 7], max_tokens=2), 0.0, has_handoff=True, local_below=2)
    ready: list[int] = []
    for _ in range(9):
        plan = s.plan(0.0)
        ready += [event.key for event in s.take_events() if isinstance(event, PagesReady)]
        if plan is not None:
            answer(s, plan)
    assert ready == [2, 3], "all come to their turn at once, before anything is cached"
    for key in ready:
        s.abort(key)
        s.drained(key)
    s.add(4, spec([1, 2, 3, 4, 6], max_tokens=2), 0.0, has_handoff=True, local_below=1)
    s.add(5, spec([1, 2, 7, 7, 7], max_tokens=2), 0.0, has_handoff=True, local_below=2)
    s.plan(0.0)
    events = s.take_events()
    assert [event.key for event in events if isinstance(event, PagesReady)] == [5], "it lacks three"
    assert [(event.key, event.num_cached_tokens) for event in events if isinstance(event, Started)] == [(4, 4)]


def test_rule_12_groups_take_turns_at_admission_and_within_one_the_oldest_goes_first():
    s = scheduler(max_step_sequences=1)
    for key, group in ((1, 7), (2, 7), (3, 7), (4, 8), (5, 9), (6, 8)):
        s.add(key, spec([key], max_tokens=1), 0.0, group=group)
    order: list[int] = []
    while plan := s.plan(0.0):
        order += [chunk.key for chunk in plan.chunks]
        answer(s, plan)
    assert order == [1, 4, 5, 2, 6, 3]


def test_rule_13_rows_of_a_paused_group_keep_their_pages_and_wait():
    s = scheduler()
    for key in (1, 2):
        s.add(key, spec([key] * 3, max_tokens=9), 0.0, group=key)
    plan = s.plan(0.0)
    assert plan is not None
    answer(s, plan)
    s.pause(1)
    for _ in range(3):
        plan = s.plan(0.0)
        assert plan is not None
        assert [chunk.key for chunk in plan.chunks] == [2]
        answer(s, plan)
    assert s.load().num_running == 2
    s.pause(2)
    assert s.plan(0.0) is None
    s.resume(1)
    s.resume(2)
    outputs = run_all(s)
    assert (outputs[1][-8:], outputs[2][-5:]) == (expected([1] * 3, 9)[1:], expected([2] * 3, 9)[4:])


def test_preempted_sequences_finish_with_the_same_tokens():
    prompts = {key: [key] * 3 for key in range(1, 5)}
    s = scheduler(num_pages=8)
    for key, prompt in prompts.items():
        s.add(key, spec(prompt, max_tokens=9), 0.0)
    preempted = 0
    outputs: dict[int, list[int]] = {}
    while plan := s.plan(0.0):
        answer(s, plan)
        for event in s.take_events():
            preempted += isinstance(event, Preempted)
            if isinstance(event, Output):
                outputs.setdefault(event.key, []).append(event.token.token_id)
    assert preempted
    assert outputs == {key: expected(prompt, 9) for key, prompt in prompts.items()}
    assert s.load().num_free_pages == 8


def test_a_sequence_that_outgrows_the_pool_ends_with_an_error():
    s = scheduler(num_pages=3)
    s.add(1, spec([1, 2], max_tokens=30), 0.0)
    events = []
    while plan := s.plan(0.0):
        answer(s, plan)
        events += s.take_events()
    events += s.take_events()
    assert isinstance(events[-1], Failed)
    assert events[-1].error.reason == "NO_FREE_PAGES"
    assert sum(isinstance(event, Output) for event in events) == 5
    s.check_integrity()
    assert s.load().num_sequences == 0


def test_end_of_sequence_counts_only_after_min_tokens():
    for min_tokens, finishes in ((0, [FinishReason.STOP]), (2, [None, None, FinishReason.STOP])):
        s = scheduler()
        s.add(1, spec([1], min_tokens=min_tokens), 0.0)
        got = []
        while plan := s.plan(0.0):
            s.apply(StepResult({c.key: [SampledToken(0)] for c in plan.chunks if c.is_sampled}, 0.0), 0.0)
            got += [event.finish for event in s.take_events() if isinstance(event, Output)]
        assert got == finishes


def test_the_context_limit_ends_a_sequence():
    s = scheduler(num_pages=64)
    s.add(1, spec([1] * 38, max_tokens=100), 0.0)
    assert len(run_all(s)[1]) == 2


def test_decode_rows_are_not_held_up_by_a_long_prompt():
    s = scheduler(num_pages=64, max_step_tokens=5)
    s.add(1, spec([1, 2], max_tokens=20), 0.0)
    plan = s.plan(0.0)
    assert plan is not None
    answer(s, plan)
    s.add(2, spec([3] * 30), 0.0)
    for _ in range(5):
        plan = s.plan(0.0)
        assert plan is not None
        assert plan.chunks[0].key == 1
        assert [len(c.token_ids) for c in plan.chunks] == [1, 4]
        answer(s, plan)


def test_a_sequence_that_fails_in_a_step_ends_alone():
    s = scheduler(num_pages=32, max_step_tokens=20)
    prompts = {key: [key, 5, 6, 7] for key in (1, 2, 3)}
    for key, prompt in prompts.items():
        s.add(key, spec(prompt), 0.0)
    plan = s.plan(0.0)
    assert plan is not None
    answer(s, plan, failing=[2])
    failed = [event for event in s.take_events() if isinstance(event, Failed)]
    assert [(event.key, event.error.reason) for event in failed] == [(2, "BAD_LOGITS")]
    s.check_integrity()
    assert {key: len(tokens) for key, tokens in run_all(s).items()} == {1: 5, 3: 5}
    assert s.load().num_free_pages == 32


def test_what_a_failed_sequence_computed_is_not_found_again_and_what_others_use_is():
    s = scheduler(num_pages=32, max_step_tokens=20)
    shared = [1, 2, 3, 4]
    s.add(1, spec([*shared, 5]), 0.0)
    answer(s, s.plan(0.0) or StepPlan(ForwardPlan([])))
    s.add(2, spec([*shared, 6, 7, 8]), 0.0)
    s.add(3, spec([9, 9, 9, 9, 9]), 0.0)
    plan = s.plan(0.0)
    assert plan is not None
    assert [(c.key, c.start) for c in plan.chunks] == [(1, 5), (2, 4), (3, 0)]
    answer(s, plan)
    answer(s, s.plan(0.0) or StepPlan(ForwardPlan([])), failing=[2, 3])
    s.add(4, spec([*shared, 6, 7, 8]), 0.0)
    s.add(5, spec([9, 9, 9, 9, 9]), 0.0)
    plan = s.plan(0.0)
    assert plan is not None
    assert [(c.key, c.start) for c in plan.chunks if c.key > 3] == [(4, 4), (5, 0)]
    s.check_integrity()


def test_a_step_copies_no_list_of_a_sequence():
    s = scheduler(num_pages=32)
    s.add(1, spec([1, 2, 3]), 0.0)
    for _ in range(3):
        plan = s.plan(0.0)
        assert plan is not None
        (chunk,) = plan.chunks
        answer(s, plan)
    again = s.plan(0.0)
    assert again is not None
    assert again.chunks[0].page_ids is chunk.page_ids
    assert again.sampling[1].output_token_ids is plan.sampling[1].output_token_ids
    assert again.sampling[1].memo is plan.sampling[1].memo


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("local"), st.lists(st.integers(1, 2), min_size=1, max_size=9)),
        st.tuples(st.just("handoff"), st.lists(st.integers(1, 2), min_size=1, max_size=9)),
        st.tuples(st.sampled_from(["abort", "arrived", "drained"]), st.integers(1, 20)),
        st.tuples(st.just("step"), st.integers(0, 9)),
    ),
    max_size=80,
)


@settings(max_examples=250, deadline=None)
@given(OPERATIONS, st.integers(1, 7), st.integers(5, 14), st.sampled_from([1, 1, 2, 3]))
def test_no_token_is_lost_or_repeated_and_every_page_comes_back(operations, max_step_tokens, lane_pages, num_lanes):
    num_pages = lane_pages * num_lanes
    s = scheduler(num_pages=num_pages, max_step_tokens=max_step_tokens, num_lanes=num_lanes)
    prompts: dict[int, list[int]] = {}
    outputs: dict[int, list[int]] = {}
    over: set[int] = set()
    moving: set[int] = set()

    def take_events() -> None:
        for event in s.take_events():
            if event.key in over:
                continue
            if isinstance(event, PagesReady):
                moving.add(event.key)
            elif isinstance(event, Output):
                outputs[event.key].append(event.token.token_id)
                if event.finish:
                    over.add(event.key)
            elif isinstance(event, Failed):
                over.add(event.key)

    def arrive(key: int) -> None:
        first = next_token(prompts[key])
        s.arrived(key, first)
        if key not in over:
            moving.discard(key)
            outputs[key].append(first)

    def step(num_failing: int) -> bool:
        plan = s.plan(0.0)
        if plan is None:
            take_events()
            return False
        assert 0 < plan.num_tokens <= max_step_tokens
        assert len({c.key for c in plan.chunks}) == len(plan.chunks) <= 4
        for chunk in plan.chunks:
            known = prompts[chunk.key] + outputs[chunk.key]
            end = chunk.start + len(chunk.token_ids)
            assert chunk.token_ids == known[chunk.start : end]
            assert (chunk.is_sampled) == (end == len(known))
            assert len(chunk.page_ids) >= s.pages.pages_for(end)
            assert {page_id // lane_pages for page_id in chunk.page_ids} == {chunk.lane}
        answer(s, plan, failing=[chunk.key for chunk in plan.chunks[:num_failing]])
        take_events()
        return True

    for name, value in operations:
        if name in ("local", "handoff"):
            key = len(prompts) + 1
            prompts[key], outputs[key] = value, []
            s.add(key, spec(value, max_tokens=8), 0.0, has_handoff=name == "handoff", local_below=key % 3)
        elif name == "abort":
            s.abort(value)
            if value in prompts:
                over.add(value)
        elif name == "arrived":
            if value in moving:
                arrive(value)
        elif name == "drained":
            if value in over:
                s.drained(value)
        else:
            step(max(0, 3 - value))
        take_events()
        s.check_integrity()
    for _ in range(10_000):
        is_stepped = step(0)
        has_moved = bool(moving)
        for key in sorted(moving):
            s.drained(key) if key in over else arrive(key)
        moving.clear()
        s.check_integrity()
        if not is_stepped and not has_moved:
            break
    assert s.load().num_sequences == 0, "a sequence is stuck"
    assert s.load().num_free_pages == num_pages
    for key, prompt in prompts.items():
        assert outputs[key] == expected(prompt, len(outputs[key]))
        if key not in over:
            raise AssertionError("a sequence ended without news")
