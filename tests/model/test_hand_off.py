"""Every state of the hand-off is as it should be; without any of its guards some state is not."""

import pytest

from .world import GUARDS
from .worlds import MISSED, NOT_MISSED, WORLDS, say, visit


@pytest.mark.parametrize("world", WORLDS, ids=[world.name for world in WORLDS])
def test_nothing_goes_wrong(world):
    """No page is freed twice, lost, written by two, or accepted after reuse; no token comes twice, is lost or wrong.

    Every run ends, and one fault costs one attempt.
    """
    explored = visit(world)
    say(f"{world.name}: {explored.num_states} states, {explored.num_steps} steps, {explored.num_ends} ends")
    assert explored.wrong is None, f"{world.name}\n{explored.wrong}"
    assert explored.num_ends


@pytest.mark.parametrize(("world", "problem"), MISSED, ids=[f"{world.name}-{problem}" for world, problem in MISSED])
def test_every_guard_is_missed_where_it_is_not(world, problem: str):
    wrong = visit(world).wrong
    assert wrong is not None
    say(f"{world.name}: {GUARDS[world.without]}\n{wrong}")
    assert problem in wrong.problem


def test_there_is_a_world_for_every_guard():
    assert {world.without for world, _ in MISSED} == set(GUARDS)


@pytest.mark.parametrize("world", NOT_MISSED, ids=lambda world: world.name)
def test_some_guards_are_there_twice(world):
    assert visit(world).wrong is None
