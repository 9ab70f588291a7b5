"""Things done one after the other in processes: what crashes or hangs costs itself alone."""

import os
import threading
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.perf.in_turn import NO_TIME, Limits, Lost, in_turn


def squares(bad, first, send):
    """Send squares of 0 to 4; at the numbers of `bad` something happens instead."""
    for number in range(first, 5):
        match bad.get(number):
            case "crash":
                os._exit(9)
            case "hang":
                threading.Event().wait()
            case "last":
                send(number**2)
                return
        send(number**2)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """A process finds this file's functions where `python -m` finds them."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


def limits(*left_s):
    """Limits that leave so much time, asked once for each process and once for each thing; a minute from then on."""
    return SimpleNamespace(left_s=chain(left_s, repeat(60.0)).__next__)


def test_all_are_done_in_their_order():
    assert list(in_turn(5, partial(squares, {}), Limits())) == [0, 1, 4, 9, 16]


def test_a_crash_costs_itself_and_is_told():
    found = list(in_turn(5, partial(squares, {1: "crash", 4: "crash"}), Limits()))
    assert found == [0, Lost("its process ended with 9"), 4, 9, Lost("its process ended with 9")]


def test_what_hangs_is_cut_off_and_what_follows_goes_on():
    found = list(in_turn(5, partial(squares, {0: "hang"}), limits(60, 0.01)))
    assert found == [Lost("cut off after 0 s: it hangs or is slow, in the compiler or in the kernel"), 1, 4, 9, 16]


def test_a_process_that_can_do_no_more_is_followed_by_another():
    assert list(in_turn(5, partial(squares, {2: "last"}), Limits())) == [0, 1, 4, 9, 16]


def test_without_time_nothing_is_begun():
    assert list(in_turn(3, partial(squares, {}), Limits(ends_at=0.0))) == [Lost(NO_TIME)] * 3


def test_what_is_known_when_time_is_over_stays():
    found = list(in_turn(5, partial(squares, {2: "hang"}), limits(60, 60, 60, 0.01, 0)))
    assert found[:2] == [0, 1]
    assert found[2].why.startswith("cut off")
    assert found[3:] == [Lost(NO_TIME)] * 2


def test_each_may_take_its_own_limit_and_all_what_is_left():
    now = iter((1.0, 8.0, 20.0)).__next__
    left = Limits(each_s=5.0, ends_at=10.0, clock=now).left_s
    assert [left(), left(), left()] == [5.0, 2.0, 0.0]
    assert Limits(each_s=5.0).left_s() == 5.0
