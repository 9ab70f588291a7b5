"""Seats in a router's queue: who has most makes room, by address before name, and none is lost."""

import random

import pytest
from headrace_core.errors import (
    OverloadedError,
)
from headrace_core.shares import Caller
from headrace_router.callers.caller import caller_of
from headrace_router.requests.waiting import WaitingRoom

from tests.unit.test_router_door import bearer


class Context:
    def __init__(self, peer, *metadata):
        self._peer, self._metadata = peer, metadata

    def peer(self):
        return self._peer

    def invocation_metadata(self):
        return self._metadata

    def auth_context(self):
        return {}


def test_a_caller_is_its_token_and_its_address():
    here, there = "ipv4:10.0.0.1:1234", "ipv4:10.0.0.2:1234"
    assert caller_of(Context(here)).name == caller_of(Context("ipv4:10.0.0.1:99")).name == "10.0.0.1"
    named = {caller_of(Context(peer, *bearer(token))).name for peer in (here, there) for token in ("", "one", "two")}
    assert len(named) == 6
    assert not any("one" in name for name in named)
    assert caller_of(Context(here, *bearer("one"))).address == "10.0.0.1"


def test_prompts_that_wait_are_bounded_in_tokens_but_for_one_of_each_caller():
    room = WaitingRoom(100, most_tokens=1000)

    def take(name, num_tokens):
        seat = room.take(Caller(name, name), evict=lambda _: False)
        try:
            seat.weigh(num_tokens)
        except OverloadedError as error:
            seat.leave()
            return error.reason, error.retry_after_s > 0
        return seat

    first = take("a", 900)
    assert take("a", 101) == ("QUEUE_FULL", True), "it has another that waits"
    other = take("b", 5000)
    assert other.num_tokens == 5000, "nothing else of its caller waits"
    assert take("a", 1) == ("QUEUE_FULL", True)
    other.leave()
    assert take("a", 100).num_tokens == 100
    first.leave()
    first.leave()
    assert take("a", 900).num_tokens == 900


def test_a_name_that_is_made_up_puts_nobody_at_another_address_out():
    room = WaitingRoom(4)
    put_out = []

    def seat(name, address):
        return room.take(Caller(name, address), evict=lambda error: put_out.append(name) or True)

    for name in "ab":
        seat(name, "honest")
        seat(name, "honest")
    seat("made up 1", "hostile")
    seat("made up 2", "hostile")
    assert put_out == ["a", "b"]
    for number in range(3, 9):
        with pytest.raises(OverloadedError):
            seat(f"made up {number}", "hostile")
    assert (put_out, room.num_taken) == (["a", "b"], 4)


@pytest.mark.parametrize("address", ["one", "another"])
def test_if_nothing_of_who_has_most_can_be_put_out_it_is_the_next_ones_turn(address):
    room, put_out = WaitingRoom(12), []

    def fill(name, count, *, address="one", is_stuck=False):
        for _ in range(count):
            room.take(Caller(name, address), evict=lambda error: not is_stuck and (put_out.append(name) or True))

    fill("greedy", 6, is_stuck=True)
    fill("middle", 5)
    fill("small", 1)
    fill("late", 1, address=address)
    assert (put_out, room.num_taken) == (["middle"], 12)


def test_seats_are_conserved_whoever_comes_and_goes():
    die, room, seats = random.Random(5), WaitingRoom(20), set()
    for _ in range(5000):
        caller = Caller(die.choice("abcd"), die.choice("xyz"))

        def evict(_):
            return die.random() < 0.7

        if die.random() < 0.6:
            try:
                seats.add(room.take(caller, is_arriving=die.random() < 0.5, evict=evict))
            except OverloadedError:
                assert room.num_taken == 20
        elif seats:
            seats.pop().leave()
        assert room.num_taken == sum(seat._room is not None for seat in seats) <= 20
    for seat in seats:
        seat.leave()
        seat.leave()
    assert (room.num_taken, room._seats) == (0, {})
