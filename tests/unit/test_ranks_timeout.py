"""How long a meeting waits for a rank, which is long while models load and short while they compute."""

from __future__ import annotations

import time

import pytest
import torch
from headrace_core.errors import UnavailableError
from headrace_core.ranks.group import RankGroup, ranks_of
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.testing.rank_processes import run_ranks


def late(world: RankGroup) -> float:
    """Meet twice, the second time without rank 1; return how long rank 0 waited for it."""
    ranks = ranks_of(ParallelLayout(2, num_expert_ranks=2), world)
    ranks.set_timeout(0.5)
    ranks.lane.all_sum(torch.ones(1))
    if world.rank:
        return 0.0
    started = time.monotonic()
    for meeting in (ranks.world, ranks.lane):
        with pytest.raises(
            UnavailableError, match="rank 0 of 2: gather: another rank is gone, or did not come in time"
        ):
            meeting.all_sum(torch.ones(1))
    return time.monotonic() - started


def test_a_meeting_waits_as_long_as_it_was_told_last():
    waited_s, _ = run_ranks(2, late)
    assert 0.5 <= waited_s < 60.0, "not the time it was joined with"
