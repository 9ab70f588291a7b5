"""Groups take turns, and within one the oldest goes first."""

from dataclasses import dataclass

from headrace_core.batch.turn_queue import TurnQueue
from hypothesis import given
from hypothesis import strategies as st


@dataclass(frozen=True)
class Waiting:
    key: int
    group: int


def test_each_group_has_its_turn_however_much_the_others_have():
    queue = TurnQueue[Waiting]()
    for key, group in ((1, 7), (2, 7), (3, 7), (4, 8), (5, 9), (6, 8)):
        queue.add(Waiting(key, group))
    assert [queue.take().key for _ in range(6)] == [1, 4, 5, 2, 6, 3]
    assert len(queue) == 0


def test_one_that_comes_back_is_the_first_of_its_group_again():
    queue = TurnQueue[Waiting]()
    for key in (1, 2, 3):
        queue.add(Waiting(key, 7))
    first = queue.take()
    queue.add(Waiting(4, 8))
    queue.add(first)
    assert [queue.take().key for _ in range(4)] == [1, 4, 2, 3]


@given(st.lists(st.tuples(st.sampled_from(["add", "take", "remove"]), st.integers(0, 3), st.integers(0, 50))))
def test_nobody_is_lost_or_served_twice_and_a_group_is_not_passed_twice(operations):
    queue, inside, passed = TurnQueue[Waiting](), {}, {}
    for name, group, key in operations:
        if name == "add" and key not in inside:
            inside[key] = Waiting(key, group)
            queue.add(inside[key])
            passed.setdefault(group, 0)
        elif name == "take" and inside:
            taken = queue.take()
            assert taken.key == min(each.key for each in inside.values() if each.group == taken.group)
            del inside[taken.key]
            for other in {each.group for each in inside.values()} - {taken.group}:
                passed[other] += 1
                assert passed[other] <= 4
            passed[taken.group] = 0
        elif name == "remove" and key in inside:
            queue.remove(inside.pop(key))
        assert len(queue) == len(inside)
        assert {each.key for each in queue} == set(inside)
        for absent in set(passed) - {each.group for each in inside.values()}:
            passed[absent] = 0
