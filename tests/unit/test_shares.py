"""Amounts that callers share: nobody gets all, nothing is lost."""

import asyncio
import random

import pytest
from headrace_core.shares import Caller, Pot, Turns

ANN, BOB, CID = (Caller(name, name) for name in ("ann", "bob", "cid"))


def fill(pot: Pot, *callers: Caller) -> list[int]:
    """Let callers take in turn until nobody can; return what each has."""
    while sum(pot.take(caller) for caller in callers):
        pass
    return [pot.held(caller) for caller in callers]


@pytest.mark.parametrize("total", [1, 2, 3, 10, 64])
def test_a_caller_alone_gets_half_and_the_next_gets_something(total):
    pot = Pot(total)
    assert fill(pot, ANN) == [(total + 1) // 2]
    assert pot.take(BOB) is (total > 1)


def test_callers_who_ask_alike_get_alike_and_leave_some_for_the_next():
    pot = Pot(40)
    assert fill(pot, ANN, BOB, CID) == [10, 10, 10]
    assert pot.take(Caller("dan", "dan"))


def test_names_at_one_address_get_three_quarters_together():
    pot = Pot(100)
    names = [Caller(f"name {number}", "one address") for number in range(1000)]
    fill(pot, *names)
    assert pot.taken == 75
    assert pot.take(ANN, 25)


def test_more_than_is_left_is_never_given():
    pot = Pot(10)
    assert pot.take(ANN, 5)
    assert not pot.take(BOB, 6)
    assert pot.take(BOB, 5)
    assert not pot.take(CID)


def test_what_is_given_back_is_there_again_whatever_the_order():
    die, pot, held = random.Random(1), Pot(50), []
    for _ in range(5000):
        caller, amount = Caller(die.choice("abc"), die.choice("xy")), die.randrange(1, 9)
        if pot.take(caller, amount):
            held.append((caller, amount))
        elif held:
            pot.give_back(*held.pop(die.randrange(len(held))))
        assert pot.taken == sum(amount for _, amount in held) <= pot.total
    for caller, amount in held:
        pot.give_back(caller, amount)
    assert (pot.left, pot.held(ANN)) == (50, 0)
    assert fill(pot, ANN) == [25]


class Turn:
    """A task that takes a turn and keeps it until told to end it."""

    def __init__(self, turns: Turns, caller: Caller, limit_s: float = 1e6) -> None:
        self.has_begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.timer = asyncio.timeout(limit_s)
        self.task = asyncio.create_task(self._run(turns, caller))

    async def _run(self, turns: Turns, caller: Caller) -> None:
        async with self.timer, turns.turn(caller, self.timer):
            self.has_begun.set()
            await self.may_end.wait()

    async def end(self) -> None:
        self.may_end.set()
        await self.task


async def settled() -> None:
    """Let every task run as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def begun(turns: Turns, *callers: Caller) -> list[Turn]:
    made = []
    for caller in callers:
        made.append(Turn(turns, caller))
        await settled()
    return made


def test_a_callers_line_keeps_nobody_else_waiting():
    async def test():
        made = await begun(Turns(4, patience_s=1e6), ANN, ANN, ANN, ANN, BOB)
        assert [turn.has_begun.is_set() for turn in made] == [True, True, False, False, True]
        for turn in made:
            await turn.end()

    asyncio.run(test())


def test_a_turn_that_is_free_goes_round_the_lines():
    async def test():
        turns, found = Turns(4, patience_s=1e6), []
        held = await begun(turns, ANN, ANN, BOB)  # one turn is left, for who has none
        made = await begun(turns, CID, *[CID] * 5, Caller("dan", "dan"), Caller("dan", "dan"))
        for turn, name in zip(made, "ccccccdd", strict=True):
            turn.may_end.set()
            turn.task.add_done_callback(lambda _, name=name: found.append(name))
        await asyncio.gather(*(turn.task for turn in made))
        assert "".join(found) == "ccdcdccc"
        for turn in held:
            await turn.end()

    asyncio.run(test())


@pytest.mark.parametrize(("patience_s", "order"), [(1e6, [0, 1, 2, 3]), (0.0, [0, 3, 2, 1])])
def test_a_line_is_served_in_order_or_from_its_end_if_its_first_waited_too_long(patience_s, order):
    async def test():
        turns, found = Turns(2, patience_s=1e6), []
        made = await begun(turns, ANN, ANN, ANN, ANN)
        turns._patience_s = patience_s
        for number, turn in enumerate(made):
            turn.may_end.set()
            turn.task.add_done_callback(lambda _, number=number: found.append(number))
        await asyncio.gather(*(turn.task for turn in made))
        assert found == order

    asyncio.run(test())


def test_who_is_cancelled_while_waiting_costs_no_turn():
    async def test():
        turns = Turns(2, patience_s=1e6)
        first, second, third = await begun(turns, ANN, ANN, ANN)
        # The second is cancelled before its task can notice that it was given the turn; the third, while it waits.
        first.may_end.set()
        third.task.cancel()
        second.task.cancel()
        await asyncio.gather(second.task, third.task, return_exceptions=True)
        await first.task
        last, other = await begun(turns, ANN, BOB)
        assert last.has_begun.is_set()
        assert other.has_begun.is_set()
        await last.end()
        await other.end()

    asyncio.run(test())


def test_a_turn_is_short_while_somebody_waits_for_it():
    async def test():
        turns = Turns(2, patience_s=0.0)
        silent, waiting = await begun(turns, ANN, ANN)
        with pytest.raises(TimeoutError):
            await silent.task
        async with asyncio.timeout(10):
            await waiting.has_begun.wait()
        assert waiting.timer.when() > asyncio.get_running_loop().time() + 1000
        await waiting.end()

    asyncio.run(test())


def test_one_callers_line_does_not_shorten_anothers_turn():
    async def test():
        turns = Turns(4, patience_s=0.0)
        (bob,) = await begun(turns, BOB)
        anns = await begun(turns, ANN, ANN, ANN)
        assert bob.timer.when() > asyncio.get_running_loop().time() + 1000
        await bob.end()
        for turn in anns:
            turn.task.cancel()
        await asyncio.gather(*(turn.task for turn in anns), return_exceptions=True)

    asyncio.run(test())
