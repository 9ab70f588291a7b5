"""The processes of a group, without processes: how the follower's service ends, and what the leader's host does."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from dataclasses import replace

import pytest
from headrace_core.config import DecodeSettings
from headrace_core.engine.leader import RankLostError
from headrace_core.engine.rank_pages import RankPages
from headrace_core.errors import StartupError
from headrace_core.ranks.group import Ranks
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.page_share import PageShare
from headrace_core.ranks.place import RankPlace
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.rank_threads import OnThread, RankThreads, ThreadRank
from headrace_core.worker.daemon import on_daemon
from headrace_core.worker.follower_service import FollowerService
from headrace_core.worker.group_pages import GroupPages
from headrace_core.worker.loading import LoadedModel
from headrace_core.worker.rank_group import RankOfGroup, agree
from headrace_decode.service import DecodeService

SETTINGS = DecodeSettings(model=".", listen="127.0.0.1:0")


def loaded(rank: ThreadRank) -> LoadedModel:
    model = loaded_fake_model()
    share = PageShare(model.layout, ParallelLayout(2, num_expert_ranks=2), rank.rank)
    pages = GroupPages(model.cache, own=model.cache.page_ids)
    return replace(model, group=RankOfGroup(rank, RankPages(model.cache, share, rank), pages))


class Group:
    """A decode worker of two ranks: rank 0 as a service, and the service that follows it."""

    def __init__(self) -> None:
        self.threads = RankThreads(2)
        first, second = self.threads.ranks
        self.leader = DecodeService(SETTINGS, loader=lambda _: loaded(first), transports=["grpc"])
        self.follower = FollowerService(SETTINGS, RankPlace(1, 2, 1), lambda _: loaded(second))
        self.signals: list[int] = []

    async def start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "kill", lambda pid, number: self.signals.append(number))
        await asyncio.gather(self.leader.start(), self.follower.start())


@async_test
async def test_a_leader_that_stops_lets_its_follower_go(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group()
    await group.start(monkeypatch)
    assert group.leader.registry.get_sample_value("headrace_ranks") == 2
    await group.leader.drain()
    await group.leader.stop()
    # Nobody told this process to leave: it does so by itself, as if somebody had.
    await eventually(lambda: group.signals == [signal.SIGTERM], "the follower leaves")
    await group.follower.drain()
    await group.follower.stop()
    assert not group.follower.failed.done()


@async_test
async def test_a_follower_told_to_leave_has_its_leader_told(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group()
    await group.start(monkeypatch)
    draining = asyncio.ensure_future(group.follower.drain())
    await eventually(lambda: group.signals == [signal.SIGTERM], "rank 0 is told with a beat")
    assert not draining.done(), "a follower follows until it is let go"
    await group.leader.drain()
    await group.leader.stop()
    await draining
    await group.follower.stop()
    assert group.signals == [signal.SIGTERM], "nobody is told twice: a second signal would end it at once"


@async_test
async def test_a_group_that_is_over_ends_both_services(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group()
    await group.start(monkeypatch)
    group.threads.end()
    await eventually(lambda: group.leader.failed.done() and group.follower.failed.done(), "both have failed")
    for rank, service in enumerate((group.leader, group.follower)):
        with pytest.raises(RankLostError, match=f"rank {rank} of 2: .* the group ends, see the other ranks' logs"):
            service.failed.result()
        await service.stop()
    assert not group.signals


@async_test
async def test_a_thread_that_hangs_holds_nobody_up() -> None:
    hanging = asyncio.ensure_future(on_daemon(threading.Event().wait, "hanging"))
    await asyncio.sleep(0)
    hanging.cancel()
    assert await on_daemon(lambda: 3, "three") == 3
    with pytest.raises(ZeroDivisionError):
        await on_daemon(lambda: 1 // 0, "raising")
    with pytest.raises(asyncio.CancelledError):
        await hanging


@pytest.mark.parametrize(("mine", "complaint"), [({"pages": 7}, "pages 8, not 7"), ({"model": "b"}, "model a, not b")])
def test_ranks_that_loaded_different_things_are_refused(mine, complaint):
    threads = RankThreads(2)
    layout = ParallelLayout(2, num_expert_ranks=2)
    first, second = (Ranks(layout, rank, rank) for rank in threads.ranks)
    told = {"model": "a", "pages": 8}
    other = OnThread(lambda: agree(second, told))
    with pytest.raises(StartupError, match=f"rank 1 loaded something else than rank 0: {complaint}; give all the same"):
        agree(first, {**told, **mine})
    with pytest.raises(StartupError, match=complaint):
        other.result()
