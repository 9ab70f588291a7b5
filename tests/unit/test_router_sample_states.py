"""A sample goes along the drawn edges, and no others."""

import pytest
from headrace_router.requests import sample_state
from headrace_router.requests.sample import Sample
from headrace_router.requests.sample_state import EDGES, SampleState


def sample_in(state):
    sample = Sample.__new__(Sample)
    sample._state = state
    return sample


@pytest.mark.parametrize("start", SampleState)
@pytest.mark.parametrize("to", SampleState)
def test_a_sample_moves_where_an_edge_is(start, to):
    sample = sample_in(start)
    if to in EDGES[start]:
        sample.move(to)
        assert sample.state is to
    else:
        with pytest.raises(AssertionError, match=f"{start.value} is not followed by {to.value}"):
            sample.move(to)
        assert sample.state is start


def test_every_state_is_drawn_reached_and_left_unless_it_is_an_end():
    assert all(state.name in sample_state.__doc__ for state in SampleState)
    assert set(EDGES) == set(SampleState)
    assert set().union(*EDGES.values()) == set(SampleState)
    assert {state for state in SampleState if not EDGES[state]} == {SampleState.FINISHED, SampleState.FAILED}
