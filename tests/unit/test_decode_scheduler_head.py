"""The head of a decode worker's queue: looked for in the prefix cache only when something changed, as if always."""

from headrace_decode.scheduler import DecodeScheduler, Output, PagesReady
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_decode_scheduler import answer, scheduler, spec


def count_matches(s: DecodeScheduler, monkeypatch) -> list[int]:
    """Let the lengths of what is looked for in the prefix cache be listed."""
    lengths: list[int] = []
    match = s.pages.match

    def counted(owner, token_ids, **options):
        lengths.append(len(token_ids))
        return match(owner, token_ids, **options)

    monkeypatch.setattr(s.pages, "match", counted)
    return lengths


def test_the_queues_head_is_not_looked_for_in_the_cache_before_anything_changed(monkeypatch):
    s = scheduler(num_pages=16)
    s.add(1, spec([1, 2, 3], max_tokens=4), 0.0)
    s.add(2, spec([4, 5, 6], max_tokens=20), 0.0)
    answer(s, s.plan(0.0))
    head = list(range(100, 124))
    s.add(3, spec(head), 0.0)
    lengths = count_matches(s, monkeypatch)
    while not any(isinstance(event, Output) and event.finish for event in s.take_events()):
        answer(s, s.plan(0.0))
    assert lengths == [len(head)]
    plan = s.plan(0.0)
    assert lengths == [len(head)] * 2, "a sequence ended"
    assert plan
    assert [chunk.key for chunk in plan.chunks] == [2, 3]


def test_the_queues_head_joins_when_the_others_pages_become_its_own():
    s = scheduler(num_pages=10, max_step_tokens=6)
    s.add(1, spec(list(range(1, 13)), max_tokens=9), 0.0)
    s.add(2, spec([*range(1, 13), 50], max_tokens=2), 0.0)
    steps = []
    while plan := s.plan(0.0):
        steps.append([chunk.key for chunk in plan.chunks])
        answer(s, plan)
    assert [1, 2] in steps, "it waits for no page to be given back"


ADDED = st.tuples(st.integers(1, 14), st.integers(1, 5), st.integers(1, 8), st.booleans())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(ADDED, st.integers(0, 4), st.integers(0, 12)), min_size=2, max_size=12))
def test_what_is_planned_is_as_if_the_head_were_always_looked_for(script):
    """Sequences with common beginnings come, go on for some steps, and some are given up."""
    quick, plain = scheduler(num_pages=9), scheduler(num_pages=9)
    plain.pages.is_refused = lambda token_ids, lane: False
    for key, ((shared, own, max_tokens, has_handoff), num_steps, aborted) in enumerate(script, start=1):
        tokens = [*range(1, shared + 1), *range(100 * key, 100 * key + own)]
        for s in (quick, plain):
            s.add(key, spec(tokens, max_tokens), 0.0, has_handoff=has_handoff)
            s.abort(aborted)
            s.drained(aborted)
        for _ in range(num_steps):
            plans = [s.plan(0.0) for s in (quick, plain)]
            assert plans[0] == plans[1]
            events = [list(s.take_events()) for s in (quick, plain)]
            assert str(events[0]) == str(events[1])
            for s, plan in zip((quick, plain), plans, strict=True):
                if plan:
                    answer(s, plan)
                for event in events[0]:
                    if isinstance(event, PagesReady):
                        s.arrived(event.key, 7)
                s.check_integrity()
