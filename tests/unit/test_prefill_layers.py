"""A step's first layers are sealed at its stops: each once, none before it is written, none again after it was."""

from __future__ import annotations

import pytest
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import StepPlan, StepResult
from headrace_core.batch.step_book import Failed
from headrace_core.errors import HeadraceError
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SampledToken, SamplingParams
from headrace_prefill.events import Admitted, Sealed
from headrace_prefill.layer_stops import LayerStops
from headrace_prefill.scheduler import PrefillScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

LIMITS = ModelLimits(vocab_size=50, max_context_tokens=256, eos_token_ids=(0,))
PAGE = 4


def layout(num_layers: int) -> KvLayout:
    """Pages of 64 bytes a layer."""
    return KvLayout(num_layers, PAGE, CacheDtype.FLOAT32, LatentAttention(3, 1))


def scheduler(*, num_layers: int = 8, least_bytes: int = 1, max_step_tokens: int = 64) -> PrefillScheduler:
    return PrefillScheduler(
        PageAllocator(64, PAGE),
        LIMITS,
        max_step_tokens=max_step_tokens,
        max_step_sequences=3,
        max_waiting_sequences=100,
        layer_stops=LayerStops.of(layout(num_layers), least_bytes=least_bytes),
    )


def add(s: PrefillScheduler, key: int, tokens: list[int]) -> None:
    s.add(key, SequenceSpec("r", 1, 0, tokens, len(tokens), SamplingParams(seed=1)), 0.0)


def answer(s: PrefillScheduler, plan: StepPlan, *, failing: int | None = None) -> None:
    failures = {failing: HeadraceError("ENGINE_FAILED", "x")} if failing is not None else {}
    tokens = {c.key: [SampledToken(5)] for c in plan.chunks if c.is_sampled and c.key not in failures}
    s.apply(StepResult(tokens, 0.0, failures=failures), 0.0)


def run(s: PrefillScheduler) -> StepPlan:
    """Run a step with all its stops."""
    plan = s.plan(0.0)
    assert plan is not None
    for stop in plan.forward.stops:
        s.layers_done(stop, f"mark {stop}")
    answer(s, plan)
    return plan


def sealed(s: PrefillScheduler, key: int) -> list[tuple[int, int, int, int | None, object]]:
    """Return (first page, pages, first layer, end layer, mark) of what was told to be sealed."""
    events = [event for event in s.take_events() if isinstance(event, Sealed) and event.key == key]
    return [(e.first_page, len(e.pages), e.first_layer, e.end_layer, e.mark) for e in events]


@pytest.mark.parametrize(
    ("num_layers", "stops"),
    [(1, ()), (2, (1,)), (3, (2,)), (4, (2, 3)), (8, (4, 6, 7)), (28, (14, 21, 25)), (61, (31, 46, 54))],
)
def test_a_step_is_cut_where_half_of_what_is_left_is_done_and_in_four_at_most(num_layers: int, stops: tuple[int, ...]):
    assert LayerStops.of(layout(num_layers)).stops == stops


def test_a_prompt_of_one_chunk_is_sealed_layer_by_layer_with_its_last_page():
    s = scheduler()
    add(s, 1, list(range(1, 11)))
    assert run(s).forward.stops == (4, 6, 7)
    assert sealed(s, 1) == [
        (0, 3, 0, 4, "mark 4"),
        (0, 3, 4, 6, "mark 6"),
        (0, 3, 6, 7, "mark 7"),
        (0, 3, 7, None, None),
    ]


def test_a_chunk_that_does_not_end_its_prompt_seals_its_full_pages_alone():
    s = scheduler(num_layers=2, max_step_tokens=10)
    add(s, 1, list(range(1, 19)))
    run(s)
    assert sealed(s, 1) == [(0, 2, 0, 1, "mark 1"), (0, 2, 1, None, None)]
    run(s)
    assert sealed(s, 1) == [(2, 3, 0, 1, "mark 1"), (2, 3, 1, None, None)]


@pytest.mark.parametrize(
    ("least_bytes", "stops", "layers"),
    [
        (4 * 3 * 64, (4, 6, 7), [(0, 4), (4, None)]),
        (5 * 3 * 64, (6, 7), [(0, 6), (6, None)]),
        (7 * 3 * 64, (7,), [(0, 7), (7, None)]),
        (7 * 3 * 64 + 1, (), [(0, None)]),
    ],
)
def test_a_small_prompt_is_not_cut_to_dust(least_bytes: int, stops: tuple[int, ...], layers: list):
    s = scheduler(least_bytes=least_bytes)
    add(s, 1, list(range(1, 11)))
    assert run(s).forward.stops == stops
    assert [(first, end) for _, _, first, end, _ in sealed(s, 1)] == layers


def test_a_step_that_told_of_no_stop_is_sealed_as_a_whole():
    s = scheduler()
    add(s, 1, list(range(1, 11)))
    plan = s.plan(0.0)
    assert plan is not None
    answer(s, plan)
    assert sealed(s, 1) == [(0, 3, 0, None, None)]


def test_without_stops_nothing_is_asked_of_a_step():
    s = PrefillScheduler(
        PageAllocator(8, PAGE), LIMITS, max_step_tokens=64, max_step_sequences=3, max_waiting_sequences=9
    )
    add(s, 1, list(range(1, 11)))
    assert run(s).forward.stops == ()


def test_rule_3_what_a_step_that_raised_had_sealed_is_another_page_before_it_is_written_again():
    s = scheduler()
    for key in (1, 2):
        add(s, key, [key] * 10)
    plan = s.plan(0.0)
    assert plan is not None
    s.layers_done(4, None)
    told = {e.key: e.pages for e in s.take_events() if isinstance(e, Sealed)}
    s.step_raised()
    s.step_raised()
    for pages in told.values():
        for page_id, generation in pages:
            assert s.pages.pool.generation(page_id) == generation + 1
    answer(s, plan, failing=1)
    failed = [e for e in s.take_events() if isinstance(e, Failed)]
    assert [(e.key, e.error.reason) for e in failed] == [(1, "ENGINE_FAILED"), (2, "STALE_PAGE")]
    assert str(failed[1].error).endswith("prefill again"), "it says what to do"
    s.check_integrity()
    assert s.load().num_free_pages == 64
    for key in (3, 4):
        add(s, key, [key - 2] * 10)
        s.plan(0.0)
        events = s.take_events()
        assert [e.num_cached_tokens for e in events if isinstance(e, Admitted)] == [0 if key == 3 else 8]
        answer(s, s._book.planned)


def test_a_sequence_of_which_nothing_was_sealed_survives_a_step_that_raised():
    s = scheduler(least_bytes=4 * 3 * 64)
    add(s, 1, [1] * 12)
    add(s, 2, [2] * 3)
    plan = s.plan(0.0)
    assert plan is not None
    s.layers_done(4, None)
    s.step_raised()
    answer(s, plan)
    assert [(e.key, e.error.reason) for e in s.take_events() if isinstance(e, Failed)] == [(1, "STALE_PAGE")]
    assert s.load().num_sequences == 1
    s.check_integrity()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 30),
    st.integers(1, 4000),
    st.data(),
)
def test_every_layer_of_every_page_is_sealed_once(lengths, num_layers, max_step_tokens, least_bytes, data):
    s = scheduler(num_layers=num_layers, max_step_tokens=max_step_tokens, least_bytes=least_bytes)
    for key, length in enumerate(lengths):
        add(s, key, [key % 2 + 1] * length)
    cells: dict[int, dict[tuple[int, int], tuple[int, int]]] = {key: {} for key in range(len(lengths))}
    while (plan := s.plan(0.0)) is not None:
        for stop in plan.forward.stops[: data.draw(st.integers(0, 3))]:
            s.layers_done(stop, None)
        answer(s, plan)
        for event in s.take_events():
            if isinstance(event, Sealed):
                for layer in range(event.first_layer, num_layers if event.end_layer is None else event.end_layer):
                    for index, page in enumerate(event.pages, start=event.first_page):
                        assert (layer, index) not in cells[event.key], "sealed twice"
                        cells[event.key][layer, index] = page
    for key, length in enumerate(lengths):
        assert len(cells[key]) == num_layers * -(-length // PAGE)
        assert len(set(cells[key].values())) == -(-length // PAGE)
        s.free(key)
    s.check_integrity()
