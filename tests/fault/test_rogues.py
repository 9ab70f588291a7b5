"""Who comes with ill intent is refused by name, and an honest client is served as before (`python -m tests.rogue`)."""

import asyncio

import pytest
from headrace_core.testing.async_test import async_test

from tests.rogue.flood import flood, problems, targets
from tests.rogue.rogues import ROGUES
from tests.rogue.stage import stage

NUM_MESSAGES = 150


@async_test
async def test_every_rogue_is_refused_by_name_while_all_are_at_it(tmp_path):
    async with stage(tmp_path) as at:
        found = await asyncio.gather(*(rogue.tries(at) for rogue in ROGUES), at.check())
        for rogue, reason in zip(ROGUES, found, strict=False):
            assert reason in rogue.reasons, rogue.tries.__name__


@pytest.mark.parametrize("target", targets(), ids=lambda target: f"{target.method} of {target.server.value}")
@async_test
async def test_spoilt_messages_get_a_reason_each_and_hurt_nobody(tmp_path, target):
    """`make test` sends few; 100,000 for each service by hand: docs/security.md."""
    async with stage(tmp_path) as at:
        outcomes = await flood(at, target, NUM_MESSAGES)
        assert outcomes.total() == NUM_MESSAGES
        assert not problems(outcomes), outcomes
