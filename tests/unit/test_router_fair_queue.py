"""The queue's order: by arrival with one client, in equal shares with several, and nobody starves."""

import random
from collections import Counter
from dataclasses import dataclass, field

from headrace_router.placement import fair_queue
from headrace_router.placement.fair_queue import FairQueue, Turn
from hypothesis import given, settings
from hypothesis import strategies as st


@dataclass(eq=False)
class Item:
    """A sequence of a client named by a path; `number` is its arrival."""

    number: int
    client: tuple[str, ...] = ("a", "a")
    cost: float = 1.0
    turn: Turn = field(init=False)

    def __post_init__(self):
        self.turn = Turn(self.client, (float(self.number), 0), self.cost)


def queue_of(*items):
    queue = FairQueue()
    for item in items:
        queue.add(item)
    return queue


def head(queue):
    return next(iter(queue))


def served(queue, count):
    """Serve from the head so often; return the items."""
    items = []
    for _ in range(count):
        items.append(head(queue))
        queue.serve(items[-1])
    return items


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["add", "late", "serve", "remove", "again"]), st.integers(0, 9)), max_size=60)
)
def test_with_one_client_the_order_is_that_of_arrival_whatever_happens(operations):
    """Also of what came late from the tokenizer, started before its turn, or comes again."""
    queue, waiting, started, late, number = FairQueue(), [], [], [], 0
    for operation, choice in operations:
        if operation == "add":
            number += 1
            late.append(Item(number, cost=1.0 + choice))
            if choice < 7:
                waiting.append(late.pop())
                queue.add(waiting[-1])
        elif operation == "late" and late:
            waiting.append(late.pop(choice % len(late)))
            queue.add(waiting[-1])
        elif operation == "again" and started:
            waiting.append(started.pop(choice % len(started)))
            queue.add(waiting[-1])
        elif operation in ("serve", "remove") and waiting:
            item = waiting.pop(choice % len(waiting))
            assert item in queue
            if operation == "serve":
                queue.serve(item)
                started.append(item)
            else:
                queue.remove(item)
            assert item not in queue
        waiting.sort(key=lambda item: item.number)
        assert list(queue) == waiting
        assert len(queue) == len(waiting)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 100), min_size=30, max_size=30), min_size=2, max_size=6), st.data())
def test_clients_that_wait_all_the_time_get_equal_shares_within_one_sequence(costs, data):
    queue = FairQueue()
    order = data.draw(st.permutations([client for client in range(len(costs)) for _ in range(30)]))
    places = Counter()
    for number, client in enumerate(order):
        queue.add(Item(number, (f"c{client}", ""), costs[client][places[client]]))
        places[client] += 1
    most, had, left = max(map(max, costs)), Counter(), Counter({f"c{client}": 30 for client in range(len(costs))})
    while min(left.values()):
        (item,) = served(queue, 1)
        had[item.client[0]] += item.cost
        left[item.client[0]] -= 1
        assert max(had[client] for client in left) - min(had[client] for client in left) <= most


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_client_that_comes_gets_its_share_from_then_on(rng):
    """Neither more, for the time before, nor less, for what others have waiting."""
    queue, number, most = FairQueue(), 0, 50
    had, left, clients = Counter(), Counter(), []
    for joined in range(5):
        clients.append(f"c{joined}")
        base = dict(had)
        for _ in range(rng.randint(20, 60)):
            for client in clients:
                while left[client] < 2:
                    number += 1
                    left[client] += 1
                    queue.add(Item(number, (client, ""), rng.randint(1, most)))
            (item,) = served(queue, 1)
            had[item.client[0]] += item.cost
            left[item.client[0]] -= 1
            since = [had[client] - base.get(client, 0) for client in clients]
            assert max(since) - min(since) <= 2 * most


def test_one_request_does_not_wait_for_another_clients_hundreds():
    queue = queue_of(*(Item(number, ("hostile", "")) for number in range(300)))
    served(queue, 5)
    single = Item(300, ("single", ""))
    queue.add(single)
    assert single in served(queue, 2)


def test_a_request_costs_its_client_what_it_uses():
    large = [Item(number, ("large", ""), 100.0) for number in range(10)]
    small = [Item(100 + number, ("small", ""), 1.0) for number in range(300)]
    queue = queue_of(*large, *small)
    first = served(queue, 205)
    assert sum(item in large for item in first) in (2, 3)


def test_names_at_one_address_share_its_part():
    many = [Item(number, ("one", f"name {number}")) for number in range(100)]
    other = [Item(100 + number, ("other", "")) for number in range(20)]
    assert sum(item in other for item in served(queue_of(*many, *other), 20)) == 10
    names = [Item(number, ("one", f"name {number % 2}")) for number in range(4)]
    assert [item.number for item in served(queue_of(*names), 4)] == [0, 1, 2, 3]
    hostile = [Item(number, ("one", "hostile")) for number in range(50)]
    single = Item(50, ("one", "single"))
    assert single in served(queue_of(*hostile, single), 2)


def test_nobody_starves_however_many_clients_come():
    queue, heavy = FairQueue(), [Item(number, ("heavy", ""), 10.0) for number in range(3)]
    for item in heavy:
        queue.add(item)
    for number in range(3, 200):
        queue.add(Item(number, (f"new {number}", "")))
        served(queue, 1)
        if not any(item in queue for item in heavy):
            return
    raise AssertionError("the heavy client starves")


def test_a_client_that_could_not_be_served_catches_up_by_one_sequence_and_no_more():
    queue = queue_of(Item(0, ("other", ""), 1000.0))
    served(queue, 1)
    for item in (*(Item(1 + i, ("stuck", "")) for i in range(30)), *(Item(100 + i, ("other", "")) for i in range(80))):
        queue.add(item)
    for _ in range(40):
        queue.serve(next(item for item in queue if item.client == ("other", "")))
    names = [item.client[0] for item in served(queue, 10)]
    assert names.count("stuck") in (5, 6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 3), st.integers(0, 1 << 32))
def test_going_and_coming_gains_nothing(costs, num_steady, seed):
    """Clients with one sequence at a time, that go when it starts and come at once, beside some that always wait."""
    rng, queue, number, had = random.Random(seed), FairQueue(), 0, Counter()
    names = [*(f"comes {i}" for i in range(len(costs))), *(f"waits {i}" for i in range(num_steady))]
    left = Counter()
    for _ in range(200):
        for i, name in enumerate(names):
            while left[name] < (1 if i < len(costs) else 2):
                number += 1
                left[name] += 1
                queue.add(Item(number, (name, ""), costs[i] if i < len(costs) else rng.randint(1, 50)))
        (item,) = served(queue, 1)
        had[item.client[0]] += item.cost
        left[item.client[0]] -= 1
        assert max(had.values()) - min(had[name] for name in names[len(costs) :]) <= 2 * 50


def test_what_comes_again_keeps_its_place_and_is_paid_for_once():
    queue = queue_of(*(Item(number, ("heavy", ""), 10.0) for number in range(10)))
    first, second, third = served(queue, 3)
    light = [Item(10 + number, ("light", ""), 10.0) for number in range(10)]
    for item in light:
        queue.add(item)
    queue.add(second)
    queue.add(first)
    assert [item.number for item in served(queue, 2)] == [0, 1]
    for number in range(4):
        queue.add(third)
        assert served(queue, 1) == [third], number
    had = Counter(item.client[0] for item in served(queue, 8))
    assert had == {"heavy": 4, "light": 4}


def test_what_started_before_its_turn_and_comes_again_is_no_further_ahead_than_it_was():
    early, waits = [Item(number, ("a", ""), 10.0) for number in range(3)], Item(3, ("b", ""), 10.0)
    queue = queue_of(*early, waits)
    for item in early:
        queue.serve(item)
    queue.add(early[2])
    assert list(queue) == [waits, early[2]]


def test_what_is_passed_and_then_served_is_paid_for_by_its_address_too():
    waits, passes, neighbour = Item(1, ("a", "x")), Item(2, ("a", "x")), Item(3, ("a", "y"))
    others = [Item(4, ("b", ""), 1.5), Item(5, ("b", ""))]
    queue = queue_of(waits, passes, neighbour, *others)
    queue.serve(passes)
    queue.serve(others[0])
    queue.add(passes)
    queue.serve(waits)
    queue.serve(passes)
    assert list(queue) == [others[1], neighbour]


def test_what_comes_late_stands_before_what_comes_again_of_its_client_and_no_further_back_than_it_stood():
    late, again, other = Item(1), Item(2), Item(3, ("b", ""))
    queue = queue_of(again, other)
    queue.serve(again)
    queue.add(again)
    queue.add(late)
    assert list(queue) == [late, again, other]
    first, second, other = Item(1, cost=10.0), Item(2, cost=10.0), Item(3, ("b", ""), 10.0)
    queue = queue_of(first, second, other)
    queue.serve(first)
    queue.serve(second)
    queue.add(second)
    queue.add(first)
    assert list(queue) == [first, other, second]


def test_a_client_that_comes_has_no_claim_on_the_time_before():
    queue = queue_of(*(Item(number, ("a", ""), 10.0) for number in range(5)))
    served(queue, 3)
    queue.add(Item(5, ("b", ""), 10.0))
    assert [item.number for item in queue] == [3, 5, 4]


def test_what_was_overtaken_by_one_that_comes_again_stays_before_it():
    queue = FairQueue()
    waits, passes, other = Item(1, ("a", "")), Item(2, ("a", "")), Item(3, ("b", ""))
    for item in (waits, passes, other):
        queue.add(item)
    queue.serve(passes)
    queue.add(passes)
    assert [item.number for item in queue] == [1, 2, 3]
    queue.serve(waits)
    assert [item.number for item in queue] == [2, 3]


def test_what_is_passed_and_then_served_is_paid_for_be_its_client_forgotten_meanwhile():
    queue = FairQueue()
    waits, passes = Item(1, ("a", "")), Item(2, ("a", ""))
    others = [Item(3 + number, ("b", "")) for number in range(3)]
    for item in (waits, passes, *others):
        queue.add(item)
    queue.serve(passes)
    queue.serve(others[0])
    queue.add(passes)  # takes the one before it along, so that nothing new of its client waits
    queue.serve(waits)
    queue.add(Item(9, ("a", "")))
    assert [item.number for item in queue] == [2, 4, 5, 9]


def test_what_started_late_and_comes_again_is_before_what_passed_it_of_the_same_client():
    """Its place is a later one: the other takes it along to its own."""
    queue, first, second = FairQueue(), Item(1), Item(2)
    others = [Item(3, ("b", "")), Item(4, ("b", ""))]
    for item in (first, second, *others):
        queue.add(item)
    for item in (second, first, *others):
        queue.serve(item)
    for item in (first, *others, second):
        queue.add(item)
    assert first.turn.place == second.turn.place
    assert list(queue) == [first, second, *others]
    assert served(queue, 4) == [first, second, *others]


def test_an_idle_queue_forgets_what_was_had():
    queue = queue_of(*(Item(number, ("a", ""), 100.0) for number in range(3)), Item(3, ("b", ""), 1.0))
    served(queue, 4)
    for number, name in enumerate("abab", 4):
        queue.add(Item(number, (name, "")))
    assert [item.number for item in queue] == [4, 5, 6, 7]


def test_of_many_clients_that_went_ahead_only_some_are_remembered():
    """One client's sequence fits nowhere; the others start at once and go. Of many, who is not ahead goes."""
    stuck = [Item(number, ("stuck", "")) for number in range(2)]
    queue, most = queue_of(*stuck), 0
    for number in range(2, 500):
        item = Item(number, (f"new {number}", ""), 10.0)
        queue.add(item)
        queue.serve(item)
        most = max(most, len(queue._tree._had))
    assert most == 2 * 1 + fair_queue._MOST_AHEAD
    assert f"new {number}" in queue._tree._had, "it is ahead"
    queue.remove(stuck[0])
    assert list(queue) == [stuck[1]], "who waits is not forgotten"


_OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "serve", "skip", "remove", "again"]), st.integers(0, 30)), max_size=80
)


@settings(max_examples=200, deadline=None)
@given(_OPERATIONS)
def test_the_queue_holds_each_of_its_entries_once_and_each_client_in_order_of_arrival(operations):
    queue, waiting, started, number = FairQueue(), [], [], 0
    for operation, choice in operations:
        if operation == "add":
            number += 1
            waiting.append(Item(number, (f"a{choice % 3}", f"n{choice % 2}"), 1.0 + choice))
            queue.add(waiting[-1])
        elif operation == "again" and started:
            waiting.append(started.pop(choice % len(started)))
            queue.add(waiting[-1])
        elif waiting and operation != "again":
            item = head(queue) if operation == "serve" else waiting[choice % len(waiting)]
            waiting.remove(item)
            if operation == "remove":
                queue.remove(item)
            else:
                queue.serve(item)
                started.append(item)
        entries = list(queue)
        assert sorted(item.number for item in entries) == sorted(item.number for item in waiting)
        for client in {item.client for item in entries}:
            numbers = [item.number for item in entries if item.client == client]
            assert numbers == sorted(numbers)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 50)), max_size=40))
def test_what_the_order_shows_is_what_is_served(arrivals):
    queue = FairQueue()
    for number, (client, cost) in enumerate(arrivals):
        queue.add(Item(number, (f"a{client % 3}", f"n{client % 2}"), float(cost)))
    assert list(queue) == served(queue, len(queue))
