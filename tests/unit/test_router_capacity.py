"""However the two sides of a fleet differ: a sequence starts, or is refused at once, and holds up nobody.

The oracle is written from what workers themselves accept (their schedulers and `SequenceSpec.check`), not from the
router's code.
"""

import random
from collections import Counter
from dataclasses import replace

import pytest
from headrace_core.errors import OverloadedError, UnavailableError
from headrace_router.placement import policy
from headrace_router.placement.capacity import Capacity, Route, Waiting, WorkerView
from headrace_router.placement.overtaken import overtaken
from headrace_router.placement.policy import MAX_OVERTAKEN, Assignment, plan
from hypothesis import example, given, settings
from hypothesis import strategies as st


def worker(role, address="", **fields):
    """An idle worker; `num_pages` pages, all free."""
    num_pages = fields.pop("num_pages", 100)
    view = WorkerView(
        address=address or role[0], page_size=16, num_pages=num_pages, num_usable_pages=num_pages,
        num_free_pages=num_pages, token_budget=512, num_tokens_in_flight=0, num_free_slots=8,
        can_prefill=role != "decode", can_decode=role != "prefill", max_context_tokens=10_000,
    )  # fmt: skip
    return replace(view, **fields)


def waiting(num_tokens=64, num_output=64, **fields):
    total = num_tokens + num_output
    return Waiting(num_tokens, num_tokens + min(num_output, 512), prefix_key=1, num_most_tokens=total, **fields)


def pages(num_tokens, view):
    return -(-num_tokens // view.page_size)


def prefills(item, view):
    """True if the idle worker accepts the prompt and does not take its first token for the last one."""
    if (
        not view.can_prefill
        or item.num_tokens >= view.max_context_tokens
        or pages(item.num_tokens, view) > view.num_pages
    ):
        return False
    is_cut = item.num_tokens + 1 >= view.max_context_tokens
    return not is_cut or item.num_most_tokens == item.num_tokens + 1


def generates(item, view):
    """True if the idle worker accepts the sequence, and its context does not cut it short."""
    if not view.can_decode or pages(item.num_tokens + 1, view) > view.num_pages:
        return False
    return item.num_tokens < view.max_context_tokens and item.num_most_tokens <= view.max_context_tokens


def is_legal(item, assignment, views):
    """True if the workers accept it, and nobody computes what is another one's task."""
    target = views[assignment.decode]
    if not generates(item, target):
        return False
    if assignment.prefill:
        return not views[assignment.prefill].can_decode and prefills(item, views[assignment.prefill])
    has_pair = any(not view.can_decode and prefills(item, view) for view in views.values())
    if target.can_prefill:
        return not has_pair
    has_any = any(view.can_prefill and (prefills(item, view) if not view.can_decode else generates(item, view))
                  for view in views.values())  # fmt: skip
    return item.has_output and not has_any


def can_be_served(item, views):
    takers = [view for view in views if generates(item, view)]
    pure = [view for view in views if not view.can_decode and prefills(item, view)]
    is_lone = any(view.can_prefill or item.has_output for view in takers)
    return bool(takers and pure) or is_lone


_ROLES = ("prefill", "decode", "both")
_WORKER = st.builds(
    lambda role, page_size, num_pages, context, budget, slots: worker(
        role, page_size=page_size, num_pages=num_pages, max_context_tokens=context, token_budget=budget,
        num_free_slots=slots,
    ),
    st.sampled_from(_ROLES), st.sampled_from([1, 4, 16, 64]), st.integers(1, 12), st.integers(2, 300),
    st.integers(1, 100), st.integers(1, 4),
)  # fmt: skip
_FLEET = st.lists(_WORKER, min_size=1, max_size=6).map(
    lambda fleet: [replace(view, address=f"w{i}") for i, view in enumerate(fleet)]
)
_ITEM = st.builds(
    lambda num_tokens, num_output, has_output: waiting(num_tokens, num_output, has_output=has_output),
    st.integers(1, 250), st.integers(1, 700), st.booleans(),
)  # fmt: skip


def lacks_a_side(fleet):
    return not (any(view.can_prefill for view in fleet) and any(view.can_decode for view in fleet))


@settings(max_examples=400, deadline=None)
@given(_ITEM, _FLEET)
@example(waiting(1600, 1), [worker("prefill", num_pages=101), worker("decode", num_pages=100)])
@example(waiting(1600, 1), [worker("prefill", num_pages=100), worker("decode", num_pages=101)])
@example(waiting(98, 1), [worker("prefill", max_context_tokens=99), worker("decode")])
@example(waiting(98, 2), [worker("prefill", max_context_tokens=99), worker("decode")])
@example(waiting(98, 2), [worker("prefill", max_context_tokens=100), worker("decode", max_context_tokens=100)])
@example(waiting(98, 3), [worker("prefill"), worker("decode", max_context_tokens=100)])
@example(
    waiting(100), [worker("prefill", "p1", max_context_tokens=90), worker("prefill", num_pages=7), worker("decode")]
)
@example(waiting(100), [worker("both", "b1", max_context_tokens=90), worker("both", num_pages=8)])
@example(waiting(98, 300), [worker("prefill", max_context_tokens=100), worker("decode")])
def test_in_an_idle_fleet_a_sequence_starts_or_is_refused_at_once(item, fleet):
    capacity, views = Capacity(fleet), {view.address: view for view in fleet}
    if lacks_a_side(fleet):
        assert plan([item], fleet) == []
        assert capacity.refusal(item) is None
        return
    error, assignments = capacity.refusal(item), plan([item], fleet)
    assert (error is None) == can_be_served(item, fleet) == bool(assignments)
    for assignment in assignments:
        assert is_legal(item, assignment, views)


@settings(max_examples=300, deadline=None)
@given(st.lists(_ITEM, max_size=10), _FLEET, st.integers(0, 1 << 32))
def test_nobody_waits_for_a_sequence_that_waits_for_something_else(queue, fleet, seed):
    """A pair that has room in the end was kept for one that came earlier and could use one of the two."""
    rng = random.Random(seed)
    loaded = [_loaded(view, rng) for view in fleet if rng.random() < 0.9]
    capacity = Capacity(fleet)
    views = {view.address: view for view in loaded}
    assignments = plan(queue, loaded, capacity)
    for assignment in assignments:
        views = _taken(views, queue[assignment.index], assignment)
    placed = {assignment.index for assignment in assignments}
    blocked = []
    for index, item in enumerate(queue):
        if index in placed or capacity.route(item) is None:
            continue
        for assignment in _choices(index, item, capacity.route(item), views):
            competitors = [other for other in blocked if _could_use(other, capacity.route(other), assignment, views)]
            assert competitors, f"{item} could start on {assignment}, and nobody before it waits for that"
        blocked.append(item)


def _loaded(view, rng):
    return replace(
        view,
        num_free_pages=rng.randint(0, view.num_pages),
        num_tokens_in_flight=rng.choice([0, rng.randint(0, 100)]),
        num_free_slots=rng.randint(0, view.num_free_slots),
    )


def _taken(views, item, assignment):
    views = dict(views)
    target = views[assignment.decode]
    reserved = min(pages(item.num_expected_tokens, target), target.num_pages)
    flight = 0 if assignment.prefill else item.num_tokens
    views[target.address] = replace(
        target, num_free_pages=target.num_free_pages - reserved, num_free_slots=target.num_free_slots - 1,
        num_tokens_in_flight=target.num_tokens_in_flight + flight,
    )  # fmt: skip
    if assignment.prefill:
        source = views[assignment.prefill]
        left = source.num_free_pages - pages(item.num_tokens, source)
        flight = source.num_tokens_in_flight + item.num_tokens
        views[source.address] = replace(source, num_free_pages=left, num_tokens_in_flight=flight)
    return views


def _choices(index, item, route, views):
    """Every assignment of the sequence's route that there is room for now."""
    sources = [v for v in views.values() if not v.can_decode and prefills(item, v) and _has_budget(item, v)]
    sources = [v.address for v in sources if pages(item.num_tokens, v) <= v.num_free_pages]
    for view in views.values():
        reserved = min(pages(item.num_expected_tokens, view), view.num_pages)
        if not generates(item, view) or view.num_free_slots < 1 or view.num_free_pages < reserved:
            continue
        if route is Route.PAIR:
            yield from (Assignment(index, source, view.address) for source in sources)
        elif view.can_prefill == (route is Route.BOTH) and _has_budget(item, view):
            yield Assignment(index, "", view.address)


def _has_budget(item, view):
    flight = view.num_tokens_in_flight
    return flight == 0 or flight + item.num_tokens <= view.token_budget


def _could_use(item, route, assignment, views):
    target = views[assignment.decode]
    if route is Route.PAIR and assignment.prefill and prefills(item, views[assignment.prefill]):
        return True
    return (route is Route.PAIR or target.can_prefill == (route is Route.BOTH)) and generates(item, target)


@settings(max_examples=60, deadline=None)
@given(_FLEET, st.lists(_ITEM, min_size=1, max_size=4), st.integers(0, 1 << 32))
def test_every_sequence_that_has_a_route_starts_within_bounded_rounds(fleet, first, seed):
    """Whatever else comes, for ever: it is overtaken so often and no more by those it competes with."""
    rng, capacity, running = random.Random(seed), Capacity(fleet), []
    queue = [item for item in first if capacity.route(item) is not None]
    num_first = len(queue)
    for _ in range(300):
        if not num_first:
            return
        arrivals = (waiting(rng.randint(1, 250), rng.randint(1, 100), has_output=rng.random() < 0.2) for _ in range(3))
        queue += [item for item in arrivals if capacity.route(item) is not None and len(queue) < 12]
        running = [entry for entry in running if rng.random() < 0.6]
        views = {view.address: view for view in fleet}
        for item, assignment in running:
            views = _taken(views, item, assignment)
        workers = list(views.values())
        assignments = plan(queue, workers, capacity)
        for index, count in overtaken(queue, assignments, workers, capacity):
            queue[index] = replace(queue[index], num_overtaken=queue[index].num_overtaken + count)
            assert queue[index].num_overtaken < MAX_OVERTAKEN + len(queue)
        running += [(queue[assignment.index], assignment) for assignment in assignments]
        placed = {assignment.index for assignment in assignments}
        num_first -= sum(index < num_first for index in placed)
        queue = [item for index, item in enumerate(queue) if index not in placed]
    raise AssertionError(f"{num_first} sequences starve")


_CLIENTS = [("one", "a"), ("one", "b"), ("two", "c"), ("three", "d")]


@settings(max_examples=60, deadline=None)
@given(_FLEET, st.lists(_ITEM, min_size=1, max_size=4), st.integers(0, 1 << 32))
def test_nobody_starves_by_what_is_kept_for_others(fleet, first, seed):
    """Also of one client, or of one address, that goes on sending; and of others that come and go."""
    rng, running = random.Random(seed), []
    fleet = [replace(view, num_slots=view.num_free_slots) for view in fleet]
    capacity = Capacity(fleet)
    queue = [replace(item, client=rng.choice(_CLIENTS)) for item in first if capacity.route(item) is not None]
    num_first = len(queue)
    senders = rng.sample(_CLIENTS, rng.randint(1, 4))
    for _ in range(400):
        if not num_first:
            return
        arrivals = [waiting(rng.randint(1, 250), rng.randint(1, 100), client=rng.choice(senders)) for _ in range(3)]
        queue += [item for item in arrivals if capacity.route(item) is not None and len(queue) < 12]
        running = [entry for entry in running if rng.random() < 0.6]
        views = {view.address: view for view in fleet}
        for item, assignment in running:
            views = _taken(views, item, assignment)
            target = views[assignment.decode]
            holders = target.holders | {item.client, item.client[:1]}
            views[target.address] = replace(target, holders=holders)
        workers = list(views.values())
        assignments = plan(queue, workers, capacity)
        for index, count in overtaken(queue, assignments, workers, capacity):
            queue[index] = replace(queue[index], num_overtaken=queue[index].num_overtaken + count)
        running += [(queue[assignment.index], assignment) for assignment in assignments]
        placed = {assignment.index for assignment in assignments}
        num_first -= sum(index < num_first for index in placed)
        queue = [item for index, item in enumerate(queue) if index not in placed]
    raise AssertionError(f"{num_first} sequences starve")


def test_only_those_that_took_what_it_could_have_used_overtake_a_sequence():
    large, small = waiting(800), waiting(50)
    fleet = [worker("prefill", "small", num_pages=10), worker("prefill", "large", num_tokens_in_flight=1),
             worker("decode", "d1", num_pages=20), worker("decode", "d2", num_free_pages=40)]  # fmt: skip
    capacity = Capacity(fleet)
    assignments = plan([large, small, small], fleet, capacity)
    assert assignments == [Assignment(1, "small", "d1"), Assignment(2, "small", "d1")]
    assert list(overtaken([large, small, small], assignments, fleet, capacity)) == []
    waits = replace(large, num_overtaken=MAX_OVERTAKEN)
    assert plan([waits, small, small], fleet, capacity) == assignments, "it claims what it could use, and that alone"


def test_a_small_worker_is_not_claimed_by_what_it_can_never_hold():
    fleet = [worker("prefill", "p1", num_pages=10), worker("prefill", "p2", num_tokens_in_flight=600), worker("decode")]
    assert plan([waiting(800), waiting(50)], fleet) == [Assignment(1, "p1", "d")]


def test_what_no_prefill_worker_holds_is_computed_by_a_worker_of_both_roles():
    fleet = [worker("prefill", num_pages=10), worker("decode"), worker("both")]
    assert plan([waiting(800)], fleet) == [Assignment(0, "", "b")]
    assert plan([waiting(100)], fleet)[0].prefill == "p"


def test_an_orphan_that_outgrew_every_prefill_worker_is_computed_by_a_decode_worker():
    fleet = [worker("prefill", num_pages=10), worker("decode")]
    orphan = waiting(800, has_output=True)
    assert plan([orphan], fleet) == [Assignment(0, "", "d")]
    assert plan([waiting(100, has_output=True)], fleet) == [Assignment(0, "p", "d")]
    assert plan([waiting(800)], fleet) == []
    assert plan([orphan], [worker("both", num_pages=10), worker("decode")]) == [Assignment(0, "", "d")]
    assert Capacity([worker("decode")]).route(orphan) is None, "with no worker that prefills, one is waited for"


def test_an_orphan_does_not_wait_behind_prompts_that_wait_for_prefill_workers():
    fleet = [worker("prefill", num_pages=10, num_tokens_in_flight=500), worker("decode")]
    assert plan([waiting(100), waiting(800, has_output=True)], fleet) == [Assignment(1, "", "d")]


def test_what_starts_leaves_a_worker_its_limits():
    short = [
        worker("prefill"),
        worker("decode", "d1", max_context_tokens=200),
        worker("decode", "d2", num_free_slots=0),
    ]
    assert [a.index for a in plan([waiting(50), waiting(50, 400), waiting(50)], short)] == [0, 2]
    budget = [worker("prefill", token_budget=512), worker("decode")]
    assert [a.index for a in plan([waiting(256), waiting(256), waiting(1)], budget)] == [0, 1]


def test_a_worker_that_takes_nothing_now_counts_as_there():
    fleet = [worker("prefill", "p1"), worker("prefill", "p2", num_pages=10), worker("decode")]
    capacity = Capacity(fleet)
    assert capacity.refusal(waiting(800)) is None
    assert plan([waiting(800, has_output=True), waiting(50)], fleet[1:], capacity) == [Assignment(1, "p2", "d")]


@pytest.mark.parametrize(
    ("item", "fleet", "error", "words"),
    [
        (waiting(800), [("prefill", 10), ("decode", 100)], OverloadedError, ["800", "prefill", "160", "shorter"]),
        (waiting(800), [("prefill", 100), ("decode", 10)], OverloadedError, ["801", "decode", "160", "shorter"]),
        (waiting(800), [("both", 10), ("both", 20)], OverloadedError, ["801", "role both", "320", "--kv-pool-mib"]),
        (waiting(800), [("both", 10), ("decode", 100)], OverloadedError, ["801", "role both", "160"]),
        (waiting(800, has_output=True), [("prefill", 10), ("decode", 20)], OverloadedError, ["801 ", "320; run a"]),
        (waiting(1600, 8400), [("prefill", 200), ("decode", 100)], OverloadedError, ["1601", "decode", "1600"]),
        (waiting(800, 9900), [("prefill", 100), ("decode", 100)], UnavailableError, ["10700", "10000", "again"]),
    ],
)  # fmt: skip
def test_a_refusal_says_what_is_too_small_and_what_to_do(item, fleet, error, words):
    views = [worker(role, f"{role}{i}", num_pages=num_pages) for i, (role, num_pages) in enumerate(fleet)]
    refusal = Capacity(views).refusal(item)
    assert type(refusal) is error
    assert refusal.reason == ("NO_FREE_PAGES" if error is OverloadedError else "NO_WORKERS")
    assert all(word in str(refusal) for word in words), str(refusal)
    assert ("shorter" in str(refusal)) == (error is OverloadedError and not item.has_output)


def test_nothing_is_claimed_beside_workers_that_take_nothing_now():
    fleet = [worker("prefill", num_tokens_in_flight=100), worker("decode", "d1", num_pages=20), worker("decode", "d2")]
    queue = [waiting(500), waiting(50)]
    assert plan(queue, fleet[:2], Capacity(fleet)) == [Assignment(1, "p", "d1")]
    assert plan(queue, fleet) == [], "there, it waits for the prefill worker alone, and claims it"


# A round's work is bounded, whatever waits.


BUSY = [worker("prefill", "large", num_pages=1000, num_tokens_in_flight=500), worker("prefill", "small"),
        worker("decode", "d1", num_pages=1000), worker("decode", "d2", num_pages=1000)]  # fmt: skip


@pytest.mark.parametrize("step", [0, 1], ids=["one size", "as many sizes"])
def test_what_nothing_open_could_hold_is_not_weighed_again_and_again(monkeypatch, step):
    """Only one worker, which is busy, could hold the large ones: the first claims it."""
    weighed = []
    best = policy._best_prefill
    monkeypatch.setattr(policy, "_best_prefill", lambda *args: weighed.append(args) or best(*args))
    queue = [waiting(2000 + step * i, 8000 - 2 * step * i) for i in range(1000)] + [waiting(50)] * 2
    assert [assignment.index for assignment in plan(queue, BUSY)] == [1000, 1001]
    assert len(weighed) <= 1 + 2


def test_the_queue_is_looked_through_no_further_than_something_open_could_hold():
    looked = []

    def queue():
        for item in [waiting(2000)] * 500 + [waiting(50)] + [waiting(2000)] * 500:
            looked.append(item)
            yield item

    kinds = Counter({waiting(2000).kind: 1000, waiting(50).kind: 1})
    assert [assignment.index for assignment in plan(queue(), BUSY, kinds=kinds)] == [500]
    assert len(looked) == 502
    assert plan(iter([waiting(2000)] * 3), BUSY, kinds=Counter({waiting(2000).kind: 3})) == []


@settings(max_examples=300, deadline=None)
@given(st.lists(_ITEM, max_size=10), _FLEET, st.integers(0, 1 << 32))
def test_how_many_are_left_of_each_kind_decides_nothing_but_where_to_stop(queue, fleet, seed):
    rng = random.Random(seed)
    loaded, capacity = [_loaded(view, rng) for view in fleet], Capacity(fleet)
    num_second = sum(capacity.route(item) not in (None, capacity.first) for item in queue)
    kinds = Counter(item.kind for item in queue)
    assert plan(queue, loaded, capacity, num_second=num_second, kinds=kinds) == plan(queue, loaded, capacity)


def test_of_a_long_queue_the_first_are_told_who_overtook_them():
    queue = [waiting(2000)] * 1000 + [waiting(50)] * 2
    assignments = plan(queue, BUSY)
    assert [assignment.index for assignment in assignments] == [1000, 1001]
    assert list(overtaken(queue, assignments, BUSY, Capacity(BUSY))) == [(i, 2) for i in range(256)]
