"""The failure matrix over gRPC: every event in every phase of a request, between real processes. See tests/matrix."""

import asyncio

import pytest

from tests.matrix.run import play_all, wanted_tokens
from tests.matrix.table import EVENTS, Cell


@pytest.fixture(scope="module")
def wanted():
    return asyncio.run(wanted_tokens())


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
def test_every_phase_ends_with_exact_tokens_or_one_clear_error_and_nothing_left(event, wanted):
    results = asyncio.run(play_all([Cell(event, phase) for phase in event.ends], wanted))
    failed = [f"while {result.phase}: {problem}" for result in results for problem in result.problems]
    assert not failed, "\n".join(failed)
