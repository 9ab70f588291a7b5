"""Pages of a group: those that land at rank 0 are every rank's, and those that it sends are put together from all."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

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
from headrace_core.testing.fake_model import FakeModel
from headrace_core.testing.rank_threads import OnThread, RankThreads
from headrace_core.worker.group_pages import GroupPages

NUM_PAGES = 5
ATTENTIONS = [LatentAttention(6, 2), KeyValueAttention(4, 3), KeyValueAttention(1, 3)]


class Pool:
    """The pool of a group of two, whose leader's engine is a thread that runs functions."""

    def __init__(self, attention: LatentAttention | KeyValueAttention) -> None:
        self.whole = KvLayout(3, 4, CacheDtype.BFLOAT16, attention)
        self.threads = RankThreads(2)
        layout = ParallelLayout(2, num_expert_ranks=2)
        self.shares = [PageShare(self.whole, layout, rank) for rank in range(2)]
        self.caches = [KvCache(share.own, NUM_PAGES) for share in self.shares]
        parts = [RankPages(cache, share) for cache, share in zip(self.caches, self.shares, strict=True)]
        self.memory = self.caches[0] if self.shares[0].is_whole else KvCache(self.whole, NUM_PAGES)
        leader = Leader(
            self.threads.ranks[0], lambda plan, on_stop: pytest.fail("no step"), parts[0], set, on_leave=lambda: None
        )
        self.pages = GroupPages(self.memory, is_whole=self.shares[0].is_whole)
        self._functions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.pages.lead(leader, self._functions.put)
        self._follower = OnThread(Follower(self.threads.ranks[1], FakeModel(), self.caches[1], parts[1]).run)
        self._leader = leader
        self._engine = OnThread(self._run)

    def close(self) -> None:
        """Run what was given to the engine, and let both ranks come to their ends. Idempotent."""
        self.finish()
        self._leader.close()
        self._follower.result()

    def finish(self) -> None:
        """Run what was given to the engine, and end it."""
        self._functions.put(None)
        self._engine.result()

    def _run(self) -> None:
        while function := self._functions.get():
            function()


@pytest.fixture(params=ATTENTIONS, ids=["latent", "heads", "one head"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    pool = Pool(request.param)
    yield pool
    pool.close()


def random_page(seed: int, size: int) -> bytes:
    return bytes(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def test_what_lands_is_every_ranks_and_can_be_sent_again(pool: Pool):
    size, layers = pool.whole.page_layer_bytes, range(1, 3)
    landed = {(layer, page): random_page(10 * layer + page, size) for layer in layers for page in (4, 2)}
    for (layer, page_id), content in landed.items():
        pool.pages.page_bytes(layer, page_id)[:] = content
    pool.pages.copy_from_host([4, 2], layers)
    pool.pages.copy_to_host([0], range(3))  # after it, in the engine's order
    for layer, page_id in landed:
        if not pool.shares[0].is_whole:
            pool.pages.page_bytes(layer, page_id)[:] = bytes(size)
    pool.pages.copy_to_host([2, 4], layers)
    assert {cell: bytes(pool.pages.page_bytes(*cell)) for cell in landed} == landed
    pool.close()
    for cache, share in zip(pool.caches, pool.shares, strict=True):
        for (layer, page_id), content in landed.items():
            assert bytes(cache.page_bytes(layer, page_id)) == share.cut(content)
        assert not any(cache.page_bytes(0, page_id) == landed[1, 4] for page_id in range(NUM_PAGES))
        assert bytes(cache.page_bytes(1, 3)) == bytes(share.own.page_layer_bytes), "other pages are as they were"


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
