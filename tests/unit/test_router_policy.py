"""The policy, by example and by random fleets: nothing is promised twice, nobody starves."""

from dataclasses import replace

import pytest
from headrace_router.placement.capacity import Waiting, WorkerView, could_decode
from headrace_router.placement.policy import (
    MAX_OVERTAKEN,
    Assignment,
    decode_pages,
    plan,
)
from headrace_router.placement.prefix import prefix_key
from hypothesis import given, settings
from hypothesis import strategies as st


def prefill(address="p", **fields):
    return replace(_view(address, can_prefill=True, can_decode=False), **fields)


def decode(address="d", **fields):
    return replace(_view(address, can_prefill=False, can_decode=True), **fields)


def both(address="b", **fields):
    return replace(_view(address, can_prefill=True, can_decode=True), **fields)


def _view(address, *, can_prefill, can_decode):
    return WorkerView(
        address=address, page_size=16, num_pages=100, num_usable_pages=100, num_free_pages=100, token_budget=512,
        num_tokens_in_flight=0, num_free_slots=8, can_prefill=can_prefill, can_decode=can_decode,
    )  # fmt: skip


def waiting(num_tokens=64, num_output=64, **fields):
    return Waiting(num_tokens=num_tokens, num_expected_tokens=num_tokens + num_output, prefix_key=1, **fields)


def test_a_sequence_starts_when_both_sides_have_room():
    assert plan([waiting()], [prefill(), decode()]) == [Assignment(0, "p", "d")]


def test_rule_8_the_worker_that_has_computed_some_of_it_is_preferred_while_it_has_room_and_did_not_fail_it():
    fleet = [prefill("p1", num_tokens_in_flight=300), prefill("p2"), decode()]
    assert plan([waiting()], fleet) == [Assignment(0, "p2", "d")]
    assert plan([waiting(prefer="p1")], fleet) == [Assignment(0, "p1", "d")]
    assert plan([waiting(prefer="p1", avoid=frozenset({"p1"}))], fleet) == [Assignment(0, "p2", "d")]
    fleet[0] = prefill("p1", num_tokens_in_flight=500)
    assert plan([waiting(prefer="p1")], fleet) == [Assignment(0, "p2", "d")]


def test_the_decode_worker_that_has_the_beginning_is_preferred_while_it_has_room_and_did_not_fail_it():
    fleet = [prefill(), decode("d1", num_free_pages=20), decode("d2"), both()]
    assert plan([waiting()], fleet) == [Assignment(0, "p", "b")]
    assert plan([waiting(prefer_decode="d1")], fleet) == [Assignment(0, "p", "d1")]
    assert plan([waiting(prefer_decode="d1", avoid=frozenset({"d1"}))], fleet) == [Assignment(0, "p", "b")]
    fleet[1] = decode("d1", num_free_pages=7)
    assert plan([waiting(prefer_decode="d1")], fleet) == [Assignment(0, "p", "b")]


def test_tokens_that_are_cached_take_pages_and_no_prompt_budget():
    shared = waiting(num_tokens=500, prefer_decode="d", num_cached_tokens=496)
    fleet = [prefill(num_tokens_in_flight=500), decode(num_free_pages=108, num_pages=200, num_usable_pages=200)]
    fleet[0] = replace(fleet[0], num_pages=200, num_free_pages=200)
    assert plan([waiting(num_tokens=500)], fleet) == []
    assert plan([shared] * 4, fleet) == [Assignment(0, "p", "d"), Assignment(1, "p", "d"), Assignment(2, "p", "d")]
    assert plan([replace(shared, num_cached_tokens=480)] * 2, fleet) == []


def test_a_sequence_needs_its_pages_in_one_lane():
    lanes = {"num_lanes": 2, "num_pages": 100}
    assert plan([waiting()], [prefill(), decode(**lanes, num_free_pages=14, most_free_pages=7)]) == []
    assert plan([waiting()], [prefill(), decode(**lanes, num_free_pages=14, most_free_pages=8)]) != []
    assert len(plan([waiting()] * 5, [prefill(), decode(**lanes, num_free_pages=17, most_free_pages=9)])) == 2
    assert plan([waiting()], [prefill(num_lanes=2, num_free_pages=6, most_free_pages=3), decode()]) == []
    assert could_decode(waiting(799), decode(**lanes))
    assert not could_decode(waiting(800), decode(**lanes))
    large = waiting(64, num_output=10_000)
    assert decode_pages(large, decode(**lanes)) == 50, "it waits for a whole lane and no longer"
    assert decode_pages(large, decode(**lanes, num_usable_pages=98)) == 48


def test_nothing_starts_without_a_decode_worker():
    assert plan([waiting()], [prefill()]) == []
    assert plan([waiting()], []) == []


def test_both_is_used_colocated_when_there_is_no_prefill_worker():
    assert plan([waiting()], [both(), decode()]) == [Assignment(0, "", "b")]


def test_both_takes_hand_offs_when_there_is_a_prefill_worker():
    assert plan([waiting()], [both(), prefill()]) == [Assignment(0, "p", "b")]


def test_the_queue_is_emptied_up_to_the_token_budget():
    queue = [waiting(200)] * 5
    assert [a.index for a in plan(queue, [prefill(), decode()])] == [0, 1]


def test_an_idle_worker_takes_a_prompt_larger_than_its_budget():
    assert plan([waiting(900)], [prefill(), decode()]) == [Assignment(0, "p", "d")]
    assert plan([waiting(900)], [prefill(num_tokens_in_flight=1), decode()]) == []


def test_pages_and_slots_of_the_decode_worker_bound_what_starts():
    assert plan([waiting()], [prefill(), decode(num_free_pages=7)]) == []
    assert plan([waiting()], [prefill(), decode(num_free_slots=0)]) == []
    assert len(plan([waiting()] * 5, [prefill(), decode(num_free_pages=17)])) == 2


def test_an_output_larger_than_the_pool_waits_for_the_whole_pool_and_no_longer():
    large = waiting(64, num_output=10_000)
    assert decode_pages(large, decode()) == 100
    assert plan([large], [prefill(), decode(num_free_pages=99)]) == []
    assert plan([large], [prefill(), decode()]) != []
    assert not could_decode(waiting(1600), decode())
    # A pool of which more than ten pages were never free: the least it needs are those of the next token.
    assert decode_pages(waiting(160, num_output=640), decode(num_usable_pages=10)) == 11


def test_the_least_loaded_prefill_worker_is_chosen():
    workers = [prefill("p1", num_tokens_in_flight=300), prefill("p2"), decode()]
    assert plan([waiting()], workers) == [Assignment(0, "p2", "d")]


def test_a_prompt_goes_where_it_fits_be_it_not_the_least_loaded():
    """A worker's budget may be larger than its peers'; an idle one takes any prompt."""
    loaded = [prefill(f"p{i}", num_tokens_in_flight=1, token_budget=1000) for i in range(8)]
    idle = prefill("idle", num_tokens_in_flight=0, token_budget=10)
    assert plan([waiting(1000)], [*loaded, idle, decode()]) == [Assignment(0, "idle", "d")]


def test_equal_loads_are_decided_by_the_beginning_of_the_prompt():
    workers = [*(prefill(f"p{i}") for i in range(4)), decode()]
    chosen = {}
    for start in range(20):
        key = prefix_key([start] * 80)
        for tail in range(3):
            assert prefix_key([start] * 64 + [tail]) == key
            item = replace(waiting(), prefix_key=key)
            chosen.setdefault(start, set()).add(plan([item], workers)[0].prefill)
    assert all(len(workers) == 1 for workers in chosen.values())
    assert len(set.union(*chosen.values())) > 1


def test_the_decode_worker_with_most_free_pages_is_chosen():
    workers = [prefill(), decode("d1", num_free_pages=50), decode("d2", num_free_pages=60)]
    assert plan([waiting()], workers)[0].decode == "d2"


def test_workers_that_failed_it_are_the_last_choice_but_a_choice():
    again = waiting(avoid=frozenset({"p1", "d1"}))
    workers = [prefill("p1"), prefill("p2", num_tokens_in_flight=400), decode("d1"), decode("d2", num_free_pages=9)]
    assert plan([again], workers) == [Assignment(0, "p2", "d2")]
    assert plan([again], [prefill("p1"), decode("d1")]) == [Assignment(0, "p1", "d1")]


def test_a_long_prompt_claims_a_worker_and_lets_others_go_on():
    long, short = waiting(600), waiting(50)
    workers = [prefill("p1", num_tokens_in_flight=100), prefill("p2", num_tokens_in_flight=400), decode()]
    assert plan([long, short], workers) == [Assignment(1, "p2", "d")]
    assert plan([long, short], [prefill("p1", num_tokens_in_flight=100), decode()]) == []


def test_nobody_is_overtaken_for_ever():
    long = waiting(600, num_overtaken=MAX_OVERTAKEN)
    workers = [prefill("p1", num_tokens_in_flight=100), prefill("p2", num_tokens_in_flight=400), decode()]
    assert plan([long, waiting(50)], workers) == []


# A part of each decode side is kept for clients that run nothing there.

A, B, C = ("one", "a"), ("one", "b"), ("two", "c")


def full(num_left, *clients, num_slots=8, **fields):
    """A decode worker with so many slots left, which runs sequences of these clients."""
    holders = frozenset(path for client in clients for path in (client, client[:1]))
    return decode(num_slots=num_slots, num_free_slots=num_left, holders=holders, **fields)


def starts(queue, *workers):
    return [assignment.index for assignment in plan(queue, [prefill(token_budget=10_000), *workers])]


def test_a_client_takes_all_slots_but_the_last_which_is_for_those_that_run_nothing_there():
    assert starts([waiting(16, 16, client=A)] * 9, decode(num_slots=8)) == list(range(7))
    assert starts([waiting(client=A)] * 3, full(2, A)) == [0]
    assert starts([waiting(client=A), waiting(client=B), waiting(client=C)], full(1, A)) == [1]
    assert starts([waiting(client=A), waiting(client=C)], full(1, A)) == [1]


def test_a_large_worker_keeps_a_sixteenth_of_its_slots_and_half_of_that_from_new_names_at_an_address():
    roomy = {"num_slots": 64, "num_pages": 9000, "num_free_pages": 9000, "num_usable_pages": 9000}
    assert len(starts([waiting(1, 1, client=A)] * 64, full(64, **roomy))) == 60
    names = [waiting(1, 1, client=("one", f"name {i}")) for i in range(64)]
    assert len(starts(names, full(64, **roomy))) == 62
    assert len(starts([*names, waiting(1, 1, client=C)], full(64, **roomy))) == 63


def test_a_worker_of_one_slot_keeps_nothing_and_one_of_two_the_second():
    assert starts([waiting(client=A)] * 2, decode(num_slots=1, num_free_slots=1)) == [0]
    assert starts([waiting(client=A)], full(1, A, num_slots=1)) == [0]
    assert starts([waiting(client=A)], full(1, A, num_slots=2)) == []


def test_pages_are_kept_as_well_and_what_needs_them_claims_nothing():
    large, small = waiting(16, 16 * 19, client=A), waiting(16, 16, client=A)
    assert starts([large, waiting(16, 16 * 11, client=C)], full(6, A, num_free_pages=31)) == [1]
    assert starts([large], full(6, A, num_free_pages=32)) == [0]
    assert starts([large, waiting(client=C)], full(6, A, num_free_pages=15)) == [1], "nor when they are not free"
    assert starts([large, small], full(6, A, num_free_pages=31)) == [], "its client's own wait behind it"
    pair = [full(6, A, num_free_pages=31, address="d1"), full(6, A, num_free_pages=30, address="d2")]
    assert starts([large, small], *pair) == [1], "but where it is no nearer to its turn"


def test_a_new_name_that_yields_holds_up_the_others_at_its_address():
    large, small = waiting(16, 16 * 25, client=("one", "new")), waiting(16, 16, client=("one", "another"))
    assert starts([small], full(6, A, num_free_pages=31)) == [0]
    assert starts([large, small], full(6, A, num_free_pages=31)) == []
    assert starts([large, small, waiting(16, 16, client=C)], full(6, A, num_free_pages=31)) == [2]
    assert starts([waiting(16, 16 * 24, client=("one", "new"))], full(6, A, num_free_pages=31)) == [0], "half as much"


def test_a_worker_that_computes_its_prompts_as_well_keeps_as_much():
    def starts_alone(queue, worker):
        return [assignment.index for assignment in plan(queue, [replace(worker, can_prefill=True)])]

    large, small = waiting(16, 16 * 19, client=A), waiting(16, 16, client=A)
    assert starts_alone([waiting(client=A), waiting(client=C)], full(1, A)) == [1]
    assert starts_alone([large, small, waiting(16, 16, client=C)], full(6, A, num_free_pages=31)) == [2]


def test_what_is_kept_from_a_client_keeps_no_other_worker_from_anybody():
    kept = replace(full(1, A, address="b", num_pages=10), can_prefill=True)
    orphan = waiting(800, has_output=True, client=C)
    assert plan([waiting(client=A), waiting(client=A), orphan], [kept, decode()]) == [Assignment(2, "", "d")]


def test_whoever_starts_there_leaves_those_that_run_something_there_what_they_are():
    assert starts([waiting(client=C), waiting(client=A)], full(2, A)) == [0]


def test_each_of_several_clients_yields_to_those_that_run_nothing_there():
    assert starts([waiting(client=A), waiting(client=C), waiting(client=("three", "d"))], full(1, A, C)) == [2]


def test_a_client_that_runs_nothing_there_gets_all_that_is_left():
    assert starts([waiting(16, 16 * 99, client=A)], decode(num_slots=8)) == [0]
    assert starts([waiting(16, 16 * 99, client=C)], full(1, A)) == [0]


def test_one_that_yields_to_others_does_not_claim_all_however_often_it_was_overtaken():
    patient = waiting(client=A, num_overtaken=MAX_OVERTAKEN)
    assert starts([patient, waiting(client=C)], full(1, A)) == [1]
    busy = decode("busy", num_free_slots=0, num_slots=8)
    assert starts([patient, waiting(client=C)], full(1, A), busy) == [], "this one claims what others keep busy"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_is_kept_from_a_client_costs_a_round_nothing_however_much_of_it_waits(num_workers):
    looked = []
    queue = [waiting(client=A)] * 1000
    kinds = {queue[0].kind: len(queue)}
    workers = [prefill(), *(full(1, A, address=f"d{i}") for i in range(num_workers))]
    assert plan((looked.append(item) or item for item in queue), workers, kinds=kinds) == []
    assert len(looked) == 2


_WORKERS = st.builds(
    lambda kind, i, free, flight, slots: kind(
        f"{kind.__name__}{i}", num_free_pages=free, num_tokens_in_flight=flight, num_free_slots=slots
    ),
    st.sampled_from([prefill, decode, both]), st.integers(0, 3), st.integers(0, 100), st.integers(0, 600),
    st.integers(0, 4),
)  # fmt: skip
_QUEUE = st.lists(st.builds(waiting, st.integers(1, 900), st.integers(1, 300)), max_size=12)


@given(_QUEUE, st.lists(_WORKERS, max_size=6, unique_by=lambda worker: worker.address))
def test_no_plan_promises_more_than_there_is(queue, workers):
    by_address = {worker.address: worker for worker in workers}
    pages = {address: worker.num_free_pages for address, worker in by_address.items()}
    slots = {address: worker.num_free_slots for address, worker in by_address.items()}
    flight = {address: worker.num_tokens_in_flight for address, worker in by_address.items()}
    assignments = plan(queue, workers)
    assert [a.index for a in assignments] == sorted({a.index for a in assignments})
    for assignment in assignments:
        item = queue[assignment.index]
        computes = assignment.prefill or assignment.decode
        assert by_address[computes].can_prefill
        assert by_address[assignment.decode].can_decode
        assert flight[computes] == 0 or flight[computes] + item.num_tokens <= by_address[computes].token_budget
        flight[computes] += item.num_tokens
        pages[assignment.decode] -= decode_pages(item, by_address[assignment.decode])
        if assignment.prefill:
            pages[assignment.prefill] -= -(-item.num_tokens // 16)
        slots[assignment.decode] -= 1
    assert all(left >= 0 for left in (*pages.values(), *slots.values()))


@settings(deadline=None, max_examples=50)
@given(st.randoms(use_true_random=False))
def test_every_sequence_starts_within_bounded_rounds_whatever_arrives(rng):
    long = waiting(1000, num_output=400)
    running, queue, rounds = [], [long], 0
    while long in queue:
        rounds += 1
        assert rounds < 300, "the long prompt starves"
        queue.extend(waiting(rng.randint(1, 200), rng.randint(1, 100)) for _ in range(rng.randint(0, 4)))
        running = [item for item in running if rng.random() < 0.7]
        workers = _loaded(running)
        placed = {assignment.index: assignment for assignment in plan(queue, workers)}
        running += [(queue[index], assignment) for index, assignment in placed.items()]
        behind = len(placed)
        kept = []
        for index, item in enumerate(queue):
            if index in placed:
                behind -= 1
            else:
                overtaken = replace(item, num_overtaken=item.num_overtaken + behind)
                kept.append(overtaken)
                if item is long:
                    long = overtaken
        queue = kept


def _loaded(running):
    """Return two prefill and two decode workers under the load of what runs."""
    workers = {view.address: view for view in (prefill("p1"), prefill("p2"), decode("d1"), decode("d2"))}
    for item, assignment in running:
        source, target = workers[assignment.prefill], workers[assignment.decode]
        tokens = source.num_tokens_in_flight + item.num_tokens
        pages = source.num_free_pages - -(-item.num_tokens // 16)
        workers[source.address] = replace(source, num_tokens_in_flight=tokens, num_free_pages=pages)
        left = target.num_free_pages - decode_pages(item, target)
        workers[target.address] = replace(target, num_free_pages=left, num_free_slots=target.num_free_slots - 1)
    return list(workers.values())
