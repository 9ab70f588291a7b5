"""Pages of a group: those that land at rank 0 are every rank's, and those that it sends are put together from all."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import pytest
from headrace_core.engine.follower import Follower
from headrace_core.engine.leader import Leader
from headrace_core.engine.rank_pages import RankPages
from headrace_core.errors import UnavailableError
from headrace_core.kv.layout import CacheDtype, KeyValueAttention, KvLayout, LatentAttention
from headrace_core.model.kv_cache import KvCache
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.page_share import PageShare
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.fake_model import FakeModel
from headrace_core.testing.rank_threads import OnThread, RankThreads, ThreadRank
from headrace_core.worker.group_pages import GroupPages
from torch import Tensor

NUM_PAGES = 5
ATTENTIONS = [LatentAttention(6, 2), KeyValueAttention(4, 3), KeyValueAttention(1, 3)]


class Pool:
    """The pool of a group of ranks, whose leader's engine is a thread that runs functions."""

    def __init__(
        self,
        attention: LatentAttention | KeyValueAttention,
        *,
        tp: int = 2,
        num_lanes: int = 1,
        is_on_device: bool = False,
    ) -> None:
        self.is_on_device = is_on_device
        self.whole = KvLayout(3, 4, CacheDtype.BFLOAT16, attention)
        self.num_pages = NUM_PAGES * num_lanes
        size = tp * num_lanes
        self.threads = RankThreads(size)
        self.layout = ParallelLayout(tp, num_expert_ranks=size)
        self.shares = [PageShare(self.whole, self.layout, rank) for rank in range(size)]
        is_whole = self.shares[0].is_whole
        self.caches = [
            KvCache(
                share.own,
                NUM_PAGES,
                has_host_copy=is_on_device,
                first_page=self.layout.lane(rank) * NUM_PAGES,
                num_host_pages=self.num_pages if is_whole and rank == 0 else 0,
            )
            for rank, share in enumerate(self.shares)
        ]
        parts = [RankPages(*of_rank) for of_rank in zip(self.caches, self.shares, self.threads.ranks, strict=True)]
        self.memory = self.caches[0] if is_whole else KvCache(self.whole, self.num_pages)
        leader = Leader(
            self.threads.ranks[0], lambda plan, on_stop: pytest.fail("no step"), parts[0], set, on_leave=lambda: None
        )
        self.pages = GroupPages(self.memory, own=self.caches[0].page_ids if is_whole else range(0))
        self._functions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.pages.lead(leader, self._functions.put)
        self._followers = [
            OnThread(Follower(rank, FakeModel(), cache, part).run)
            for rank, cache, part in list(zip(self.threads.ranks, self.caches, parts, strict=True))[1:]
        ]
        self._leader = leader
        self._engine = OnThread(self._run)

    def close(self) -> None:
        """Run what was given to the engine, and let all ranks come to their ends. Idempotent."""
        self.finish()
        self._leader.close()
        for follower in self._followers:
            follower.result()

    def finish(self) -> None:
        """Run what was given to the engine, and end it."""
        self._functions.put(None)
        self._engine.result()

    def wait(self) -> None:
        """Wait until what was given to the engine has run, and every rank has done its share."""
        is_done = threading.Event()
        self._functions.put(lambda: self._leader.ask_pages(self.memory, [], range(1)))
        self._functions.put(is_done.set)
        assert is_done.wait(WAIT_S)

    def _run(self) -> None:
        while function := self._functions.get():
            function()


SHAPES = [(2, 1), (1, 2), (2, 2)]


@pytest.fixture(params=[(a, s, d) for a in ATTENTIONS for s in SHAPES for d in (False, True)], ids=str)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    attention, (tp, num_lanes), is_on_device = request.param
    pool = Pool(attention, tp=tp, num_lanes=num_lanes, is_on_device=is_on_device)
    yield pool
    pool.close()


def random_page(seed: int, size: int) -> bytes:
    return bytes(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def test_what_lands_is_its_lanes_alone_and_can_be_sent_again(pool: Pool):
    size, layers, last = pool.whole.page_layer_bytes, range(1, 3), pool.num_pages - 1
    page_ids = [4, 2, last, last - 2]
    landed = {(layer, page): random_page(10 * layer + page, size) for layer in layers for page in page_ids}
    for (layer, page_id), content in landed.items():
        pool.pages.page_bytes(layer, page_id)[:] = content
    pool.pages.copy_from_host(page_ids, layers)
    pool.wait()
    for cache in pool.caches:  # what is computed with is all that stays
        for layer, page_id in landed if pool.is_on_device else ():
            with suppress(IndexError):
                cache.page_bytes(layer, page_id)[:] = bytes(cache.layout.page_layer_bytes)
    for layer, page_id in landed:
        if pool.memory is not pool.caches[0] or page_id not in pool.caches[0].page_ids:
            pool.pages.page_bytes(layer, page_id)[:] = bytes(size)
    pool.pages.copy_to_host(page_ids, layers)
    assert {cell: bytes(pool.pages.page_bytes(*cell)) for cell in landed} == landed
    pool.close()
    for cache, share in zip(pool.caches, pool.shares, strict=True):
        cache.copy_to_host(list(cache.page_ids), range(3))
        for layer in range(3):
            for page_id in cache.page_ids:
                content = share.cut(landed.get((layer, page_id), bytes(size)))
                assert bytes(cache.page_bytes(layer, page_id)) == content, f"page {page_id} of rank {share.rank}"


def counted(rank: ThreadRank, received: dict[int, int]) -> Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]:
    """Return its `exchange`, which adds to `received` how many rows came."""
    exchange = rank.exchange

    def exchange_and_count(rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        received[rank.rank] = received.get(rank.rank, 0) + sum(receive)
        return exchange(rows, send, receive)

    return exchange_and_count


def test_nothing_travels_to_or_from_ranks_of_other_lanes():
    """A page's bytes go once to each rank that keeps a part of it, and come back from those that make it whole."""
    pool = Pool(LatentAttention(6, 2), tp=2, num_lanes=2)
    received: dict[int, int] = {}
    for rank in pool.threads.ranks:
        rank.exchange = counted(rank, received)
    of_lane_1 = [NUM_PAGES, NUM_PAGES + 3]
    pool.pages.copy_from_host(of_lane_1, range(3))
    pool.pages.copy_to_host(of_lane_1, range(3))
    pool.close()
    assert received == {0: 6, 1: 0, 2: 6, 3: 6}
    alone = Pool(LatentAttention(6, 2), tp=1, num_lanes=2)
    alone.pages.copy_from_host([0, 1], range(3))
    alone.pages.copy_to_host([0, 1], range(3))
    alone.close()
    assert [message[:1] for message in alone.threads.ranks[1].messages] == [b"\x04"], "it heard of lane 0"


def test_nobody_waits_for_pages_of_a_group_that_is_over():
    pool = Pool(KeyValueAttention(4, 3))
    pool.finish()
    asking = OnThread(lambda: pool.pages.copy_to_host([1], range(3)))
    pool.pages.close()
    with pytest.raises(UnavailableError, match="the group of this worker's ranks is over"):
        asking.result()
    with pytest.raises(UnavailableError, match="is over"):
        pool.pages.copy_to_host([1], range(3))
    pool.close()
