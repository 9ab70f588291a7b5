"""One planning round, rule by rule: what is taken off as it is promised, where a budget ends, who is chosen first."""

from dataclasses import replace

import pytest
from headrace_router.placement.capacity import Capacity
from headrace_router.placement.overtaken import overtaken
from headrace_router.placement.policy import (
    MAX_OVERTAKEN,
    Assignment,
    Waiting,
    WorkerView,
    decode_pages,
    plan,
    prefill_pages,
)
from headrace_router.placement.prefix import prefix_key

PAGE = 16


def view(address: str, role: str, **fields) -> WorkerView:
    usual = {
        "page_size": PAGE, "num_pages": 100, "num_usable_pages": 100, "num_free_pages": 100, "token_budget": 512,
        "num_tokens_in_flight": 0, "num_free_slots": 8,
    }  # fmt: skip
    roles = {"can_prefill": role in ("prefill", "both"), "can_decode": role in ("decode", "both")}
    return WorkerView(address=address, **(usual | roles | fields))


def prefill(address="p", **fields) -> WorkerView:
    return view(address, "prefill", **fields)


def decode(address="d", **fields) -> WorkerView:
    return view(address, "decode", **fields)


def both(address="b", **fields) -> WorkerView:
    return view(address, "both", **fields)


def waiting(num_tokens=16, num_output=16, **fields) -> Waiting:
    return Waiting(**({"prefix_key": 1} | fields), num_tokens=num_tokens, num_expected_tokens=num_tokens + num_output)


def placed(queue: list[Waiting], *workers: WorkerView) -> list[int]:
    """Return who starts: places in the queue."""
    return [assignment.index for assignment in plan(queue, list(workers))]


def chosen(item: Waiting, *workers: WorkerView) -> tuple[str, str]:
    """Return the addresses that one sequence gets."""
    (assignment,) = plan([item], list(workers))
    return assignment.prefill, assignment.decode


# Where a budget ends.


@pytest.mark.parametrize(("in_flight", "starts"), [(511, True), (512, False), (513, False)])
def test_a_prompt_that_fills_the_token_budget_exactly_starts_and_one_more_token_waits(in_flight, starts):
    item = waiting(1)
    assert bool(placed([item], prefill(num_tokens_in_flight=in_flight), decode())) == starts
    assert bool(placed([item], both(num_tokens_in_flight=in_flight))) == starts


@pytest.mark.parametrize(("num_free_pages", "starts"), [(4, True), (3, False)])
def test_a_prompt_takes_whole_pages_of_the_prefill_worker_and_no_room_for_output(num_free_pages, starts):
    item = waiting(49, num_output=400)
    assert prefill_pages(item, prefill()) == 4
    assert bool(placed([item], prefill(num_free_pages=num_free_pages), decode())) == starts


@pytest.mark.parametrize(("num_free_pages", "starts"), [(5, True), (4, False)])
def test_the_decode_side_needs_pages_for_prompt_and_expected_output(num_free_pages, starts):
    item = waiting(49, num_output=16)
    assert decode_pages(item, decode()) == 5
    assert bool(placed([item], prefill(), decode(num_free_pages=num_free_pages))) == starts
    assert bool(placed([item], both(num_free_pages=num_free_pages))) == starts


@pytest.mark.parametrize(("num_free_slots", "starts"), [(1, True), (0, False), (-1, False)])
def test_the_decode_side_needs_a_slot(num_free_slots, starts):
    assert bool(placed([waiting()], prefill(), decode(num_free_slots=num_free_slots))) == starts
    assert bool(placed([waiting()], both(num_free_slots=num_free_slots))) == starts


def test_the_prefill_worker_needs_no_slot():
    assert placed([waiting()], prefill(num_free_slots=0), decode()) == [0]


@pytest.mark.parametrize(("num_output", "num_pages"), [(143, 10), (144, 10), (145, 10), (10_000, 10)])
def test_expected_output_reserves_no_more_than_was_ever_free(num_output, num_pages):
    assert decode_pages(waiting(16, num_output), decode(num_usable_pages=10)) == num_pages


def test_a_prompt_larger_than_was_ever_free_reserves_itself_and_its_next_token():
    small = decode(num_usable_pages=2)
    assert decode_pages(waiting(48, num_output=100), small) == 4
    assert decode_pages(waiting(47, num_output=100), small) == 3
    assert decode_pages(waiting(48, num_output=1), small) == 4
    assert decode_pages(waiting(31, num_output=1), small) == 2


# What is promised in a round is not promised again.


def test_prompt_tokens_are_taken_off_the_prefill_workers_budget_within_a_round():
    queue = [waiting(200), waiting(200), waiting(112), waiting(1)]
    assert placed(queue, prefill(), decode()) == [0, 1, 2]
    assert placed(queue, prefill(token_budget=400), decode()) == [0, 1]


def test_pages_are_taken_off_the_prefill_worker_within_a_round():
    assert placed([waiting(33)] * 4, prefill(num_free_pages=8), decode()) == [0, 1]


def test_pages_are_taken_off_the_decode_worker_within_a_round():
    assert placed([waiting(16, 17)] * 4, prefill(), decode(num_free_pages=8)) == [0, 1]


def test_slots_are_taken_off_the_decode_worker_within_a_round():
    assert placed([waiting()] * 4, prefill(), decode(num_free_slots=2)) == [0, 1]


def test_tokens_pages_and_slots_are_taken_off_a_colocated_worker_within_a_round():
    assert placed([waiting(200)] * 4, both()) == [0, 1]
    assert placed([waiting(16, 17)] * 4, both(num_free_pages=8)) == [0, 1]
    assert placed([waiting()] * 4, both(num_free_slots=3)) == [0, 1, 2]


def test_a_decode_side_computes_no_prompt_for_a_pair():
    """Prompt tokens go to the prefill worker's account alone, and output's pages to the decode side's."""
    assert placed([waiting(200)] * 2, prefill(token_budget=1000), both(num_tokens_in_flight=512)) == [0, 1]
    assert placed([waiting(16, 1000)] * 2, prefill(num_free_pages=2), decode(num_free_pages=200)) == [0, 1]
    busy = both("b1", num_tokens_in_flight=512)
    assert chosen(waiting(200), prefill(), busy, both("b2", num_free_pages=50)) == ("p", "b1")
    pair_then_alone = [waiting(100), waiting(512)]
    assert plan(pair_then_alone, [prefill(num_pages=10), both()]) == [Assignment(0, "p", "b"), Assignment(1, "", "b")]


def test_a_round_spreads_prompts_over_prefill_workers_and_output_over_decode_workers():
    workers = [prefill("p1"), prefill("p2"), decode("d1"), decode("d2")]
    pairs = [(assignment.prefill, assignment.decode) for assignment in plan([waiting(128)] * 4, workers)]
    assert sorted(pair[0] for pair in pairs) == ["p1", "p1", "p2", "p2"]
    assert [pair[1] for pair in pairs] == ["d1", "d2", "d1", "d2"]


def test_planning_changes_no_view_and_no_queue():
    workers = [prefill(), decode()]
    queue = [waiting(), waiting()]
    plan(queue, workers)
    assert (workers, queue) == ([prefill(), decode()], [waiting(), waiting()])


# Who is chosen first.


def test_the_decode_worker_with_most_free_pages_is_chosen_and_the_first_of_equals():
    assert chosen(waiting(), prefill(), decode("d1", num_free_pages=50), decode("d2", num_free_pages=51))[1] == "d2"
    assert chosen(waiting(), prefill(), decode("d2"), decode("d1"))[1] == "d1"


def test_a_decode_worker_with_room_is_chosen_before_one_that_never_failed_it():
    item = waiting(avoid=frozenset({"d1"}))
    assert chosen(item, prefill(), decode("d1"), decode("d2", num_free_slots=0))[1] == "d1"
    assert chosen(item, prefill(), decode("d1"), decode("d2", num_free_pages=2))[1] == "d2"


def test_a_prefill_worker_that_never_failed_it_is_chosen_before_a_less_loaded_one():
    item = waiting(avoid=frozenset({"p1"}))
    assert chosen(item, prefill("p1"), prefill("p2", num_tokens_in_flight=400), decode())[0] == "p2"
    assert chosen(item, prefill("p1"), prefill("p2", num_tokens_in_flight=512), decode())[0] == "p1"


@pytest.mark.parametrize(("in_flight", "is_equal"), [(127, True), (128, False)])
def test_loads_are_compared_by_quarters_of_the_budget(in_flight, is_equal):
    """Within a quarter the beginning of the prompt decides, so that some prompts go to the more loaded worker."""
    workers = [prefill("p1", num_tokens_in_flight=in_flight), prefill("p2"), decode()]
    got = {chosen(waiting(prefix_key=key), *workers)[0] for key in range(40)}
    assert got == ({"p1", "p2"} if is_equal else {"p2"})


def test_loads_are_shares_of_each_workers_own_budget():
    workers = [prefill("large", num_tokens_in_flight=200, token_budget=1000), prefill("small", token_budget=100)]
    workers[1] = replace(workers[1], num_tokens_in_flight=60)
    assert {chosen(waiting(prefix_key=key), *workers, decode())[0] for key in range(20)} == {"large"}


def test_a_worker_without_a_budget_takes_one_prompt_at_a_time():
    assert placed([waiting(), waiting()], prefill(token_budget=0), decode()) == [0]
    assert placed([waiting()], prefill(token_budget=0, num_tokens_in_flight=1), decode()) == []


def test_the_first_64_tokens_decide_whose_cache_a_prompt_belongs_to():
    tokens = list(range(100))
    assert prefix_key(tokens) == prefix_key([*tokens[:64], 7, 7])
    assert prefix_key(tokens) == prefix_key(tokens[:64])
    assert prefix_key(tokens) != prefix_key([*tokens[:63], 7, *tokens[64:]])
    assert prefix_key([1, 23]) != prefix_key([12, 3])


def test_a_colocated_worker_with_budget_is_chosen_before_one_with_more_pages():
    busy = both("b1", num_tokens_in_flight=512)
    assert chosen(waiting(), busy, both("b2", num_free_pages=50)) == ("", "b2")
    assert chosen(waiting(), both("b1", num_free_slots=0), both("b2", num_free_pages=50)) == ("", "b2")


def test_a_colocated_worker_that_never_failed_it_is_chosen_before_one_with_more_pages():
    item = waiting(avoid=frozenset({"b1"}))
    assert chosen(item, both("b1"), both("b2", num_free_pages=50)) == ("", "b2")
    assert chosen(item, both("b1"), both("b2", num_tokens_in_flight=512)) == ("", "b1")
    assert chosen(waiting(), both("b1", num_free_pages=49), both("b2", num_free_pages=50)) == ("", "b2")


# Who waits, and what it claims.


def test_a_sequence_that_waits_for_a_decode_worker_claims_the_one_it_would_get_and_no_prefill_worker():
    large, small = waiting(16, 1000), waiting()
    workers = [prefill(), decode("d1", num_free_pages=60), decode("d2", num_free_pages=50)]
    assert plan([large, small], workers) == [Assignment(1, "p", "d2")]
    assert plan([large, small], workers[:2]) == []


def test_a_sequence_that_waits_for_a_prefill_worker_claims_it_and_no_decode_worker():
    large, small = waiting(400), waiting()
    workers = [prefill("p1", num_tokens_in_flight=200), prefill("p2", num_tokens_in_flight=300), decode()]
    assert plan([large, small], workers) == [Assignment(1, "p2", "d")]


def test_colocated_a_sequence_claims_the_worker_it_would_get():
    large, small = waiting(400), waiting()
    workers = [both("b1", num_tokens_in_flight=200), both("b2", num_tokens_in_flight=200, num_free_pages=50)]
    assert plan([large, small], workers) == [Assignment(1, "", "b2")]
    assert plan([large, small], workers[:1]) == []


@pytest.mark.parametrize(("num_overtaken", "starts"), [(MAX_OVERTAKEN - 1, [1]), (MAX_OVERTAKEN, [])])
def test_a_sequence_lets_only_so_many_go_first(num_overtaken, starts):
    large = waiting(400, num_overtaken=num_overtaken)
    workers = [prefill("p1", num_tokens_in_flight=200), prefill("p2", num_tokens_in_flight=300), decode()]
    assert placed([large, waiting()], *workers) == starts


def test_a_sequence_that_starts_closes_nothing_however_often_it_was_overtaken():
    assert placed([waiting(num_overtaken=MAX_OVERTAKEN), waiting()], prefill(), decode()) == [0, 1]


@pytest.mark.parametrize(("num_overtaken", "address"), [(MAX_OVERTAKEN - 1, "d2"), (MAX_OVERTAKEN, "d1")])
def test_one_that_was_overtaken_often_claims_every_decode_side_that_could_hold_it(num_overtaken, address):
    workers = [prefill("small", num_pages=10), prefill("large", num_tokens_in_flight=500)]
    workers += [decode("d1", num_pages=20, num_free_pages=20), decode("d2")]
    assert plan([waiting(800, num_overtaken=num_overtaken), waiting()], workers) == [Assignment(1, "small", address)]


@pytest.mark.parametrize(
    ("first", "num_second", "fleet", "starts"),
    [
        ([waiting(400)], None, [prefill(num_tokens_in_flight=200), decode()], []),
        ([waiting()], None, [prefill(num_pages=10), decode(num_free_slots=0)], []),
        ([waiting(100), waiting(800)], 1, [prefill(num_pages=10, num_tokens_in_flight=500), both()], [1]),
    ],
    ids=["no prefill worker", "no decode side", "none that takes another"],
)
def test_a_round_ends_when_no_worker_is_left_for_the_usual_route(first, num_second, fleet, starts):
    """The first ones claim it, or take what they can; what comes behind is not even looked at."""
    looked = []
    queue = (looked.append(item) or item for item in [*first, *[waiting()] * 500])
    assert [assignment.index for assignment in plan(queue, fleet, num_second=num_second)] == starts
    assert len(looked) == len(first) + 1


@pytest.mark.parametrize(
    ("fleet", "has_second"),
    [
        ([prefill(), decode()], False),
        ([prefill(), decode(), both()], False),
        ([prefill(), both(num_pages=101)], True),
        ([prefill(max_context_tokens=200), both(max_context_tokens=201)], True),
        ([prefill(max_context_tokens=200), both(max_context_tokens=200)], False),
        ([prefill(max_context_tokens=200), both(num_pages=101, max_context_tokens=199)], True),
        ([prefill(num_pages=101), both(), decode(num_pages=101)], False),
        ([prefill(), decode(num_pages=101)], True),
        ([both(), decode(num_pages=101)], True),
        ([decode(), decode("d2", num_pages=101)], False),
    ],
)
def test_a_fleet_has_a_second_route_where_others_hold_more_than_those_of_the_first(fleet, has_second):
    assert Capacity(fleet).has_second_routes == has_second


def overtook(queue: list[Waiting], *workers: WorkerView) -> list[tuple[int, int]]:
    """Return who is overtaken in a round, and by how many."""
    return list(overtaken(queue, plan(queue, workers), workers, Capacity(workers)))


def test_one_computed_by_a_worker_of_both_roles_claims_no_decode_worker_and_is_not_overtaken_there():
    workers = [prefill(num_pages=10), decode(), both(num_free_slots=0)]
    queue = [waiting(800, num_overtaken=MAX_OVERTAKEN), waiting()]
    assert plan(queue, workers) == [Assignment(1, "p", "d")]
    assert overtook(queue, *workers) == []


def test_one_whose_prefill_worker_was_used_was_overtaken_be_it_that_it_waits_for_another_decode_side():
    workers = [prefill(), decode("d1", num_pages=20, num_free_pages=20), decode("d2", num_free_slots=0)]
    queue = [waiting(400), waiting()]
    assert plan(queue, workers) == [Assignment(1, "p", "d1")]
    assert overtook(queue, *workers) == [(0, 1)]


def test_each_is_overtaken_on_its_own_route():
    workers = [prefill("p1", num_pages=30, num_tokens_in_flight=200), decode(), both(num_free_slots=0)]
    workers += [prefill("p2", num_pages=30, num_tokens_in_flight=300)]
    queue = [waiting(800), waiting(400), waiting()]
    assert plan(queue, workers) == [Assignment(2, "p2", "d")]
    assert overtook(queue, *workers) == [(1, 1)], "the first waits for the worker of both roles"


def test_nobody_is_overtaken_where_nobody_starts():
    assert overtook([waiting()], prefill(), decode(num_free_slots=0)) == []
    assert overtook([], prefill(), decode()) == []
