"""From a process's place to a group of ranks that have loaded the same, in parts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from headrace_core import __version__
from headrace_core.config import WorkerSettings
from headrace_core.engine.rank_pages import RankPages
from headrace_core.errors import StartupError
from headrace_core.kv.layout import KvLayout
from headrace_core.model.kv_cache import KvCache
from headrace_core.ranks.group import ALONE, RankGroup, Ranks, join_ranks
from headrace_core.ranks.page_share import PageShare
from headrace_core.ranks.place import RankPlace
from headrace_core.ranks.served import served_layout
from headrace_core.transfer.memfd import Memfd
from headrace_core.worker.group_pages import GroupPages

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankOfGroup:
    """What one rank of several has besides its model: the others, its part of pages, and rank 0's whole ones."""

    ranks: RankGroup
    part: RankPages
    pages: GroupPages


def rank_of_group(ranks: Ranks, cache: KvCache, whole: KvLayout, memory: Memfd | None) -> RankOfGroup:
    """Return what a rank has whose part of pages of layout `whole` is in `cache`.

    `memory` is what other processes can be let read; the cache is built on it where every rank has all of each page.
    """
    share = PageShare(whole, ranks.layout, ranks.rank)
    moved = cache
    if not share.is_whole and ranks.rank == 0:
        # Real memory only for the pages that are moved.
        moved = KvCache(whole, cache.num_pages, allocate=memory and memory.allocate)
    return RankOfGroup(ranks.world, RankPages(cache, share), GroupPages(moved, is_whole=share.is_whole))


def join(settings: WorkerSettings, place: RankPlace) -> Ranks:
    """Meet the other ranks; alone, nobody is met.

    Raises:
        StartupError, CheckpointError: as `served_layout`.
        UnavailableError: RANK_LOST, not all came.
    """
    if place.size == 1:
        return ALONE
    layout = served_layout(settings.model, place.size, attention_tp=settings.attention_tp, experts=settings.experts)
    log.info("meeting the other ranks", extra={"rank": place.rank, "ranks": place.size, "layout": str(layout)})
    return join_ranks(layout, rank=place.rank, device=settings.device, timeout_s=settings.rank_start_timeout_s)


def agree(ranks: Ranks, loaded: Mapping[str, object]) -> None:
    """Wait until every rank has loaded, and see that all loaded the same.

    Raises:
        StartupError: BAD_RANKS, some did not; says which and in what.
        UnavailableError: RANK_LOST, one could not.
    """
    mine = {"version": __version__, **loaded}
    first, *others = (json.loads(said) for said in ranks.world.gather_bytes(json.dumps(mine).encode()))
    for rank, other in enumerate(others, start=1):
        unlike = [f"{name} {other.get(name)}, not {value}" for name, value in first.items() if other.get(name) != value]
        if unlike:
            problem = f"rank {rank} loaded something else than rank 0: {'; '.join(unlike)}; give all the same options"
            raise StartupError("BAD_RANKS", problem)
