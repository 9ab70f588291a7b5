"""Every state of the way back is as it should be; without any of its guards some state is not."""

import pytest

from .prefix import PREFIX_MISSED, PREFIX_WORLDS, visit_prefix
from .prefix_world import PREFIX_GUARDS
from .worlds import say


@pytest.mark.parametrize("world", PREFIX_WORLDS, ids=lambda world: world.name)
def test_nothing_goes_wrong(world):
    """A prompt is computed on what it is, or from the beginning; every page is free again, every call ends."""
    explored = visit_prefix(world)
    say(f"{world.name}: {explored.num_states} states, {explored.num_steps} steps, {explored.num_ends} ends")
    assert explored.wrong is None, f"{world.name}\n{explored.wrong}"
    assert explored.num_ends


@pytest.mark.parametrize(("world", "problem"), PREFIX_MISSED, ids=[world.name for world, _ in PREFIX_MISSED])
def test_every_guard_is_missed_where_it_is_not(world, problem: str):
    wrong = visit_prefix(world).wrong
    assert wrong is not None
    say(f"{world.name}\n{wrong}")
    assert problem in wrong.problem


def test_there_is_a_world_for_every_guard():
    assert {guard for world, _ in PREFIX_MISSED for guard in world.without} == set(PREFIX_GUARDS)
