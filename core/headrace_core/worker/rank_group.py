"""From a process's place to a group of ranks that have loaded the same, in parts."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from headrace_core import __version__
from headrace_core.config import WorkerSettings
from headrace_core.engine.balance import Rule
from headrace_core.engine.rank_experts import RankExperts, StepClock
from headrace_core.engine.rank_pages import RankPages
from headrace_core.errors import StartupError
from headrace_core.expert_moves import Network
from headrace_core.expert_placement import in_order
from headrace_core.kv.layout import KvLayout
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.model import Model
from headrace_core.ranks.group import ALONE, RankGroup, Ranks, join_ranks
from headrace_core.ranks.layout import ExpertsBy, ParallelLayout
from headrace_core.ranks.page_share import PageShare
from headrace_core.ranks.place import RankPlace
from headrace_core.ranks.served import served_layout
from headrace_core.ranks.two_batches import with_two_batches
from headrace_core.transfer.memfd import Memfd
from headrace_core.worker.group_pages import GroupPages

log = logging.getLogger(__name__)

_REBALANCE_S = 60
"""Between two looks at whether experts are to move, where no other time is said."""


@dataclass(frozen=True, slots=True)
class GroupExperts:
    """A rank's whole experts, and when they move."""

    own: RankExperts
    rule: Rule


@dataclass(frozen=True, slots=True)
class RankOfGroup:
    """What one rank of several has besides its model: the others, its part of pages, and rank 0's whole ones.

    `experts` None: ranks have parts of all.
    """

    ranks: RankGroup
    part: RankPages
    pages: GroupPages
    experts: GroupExperts | None = None


def rank_cache(
    ranks: Ranks, own: KvLayout, whole: KvLayout, lane_pages: int, *, device: str = "cpu", memory: Memfd | None = None
) -> KvCache:
    """Return the cache of one rank: pages of layout `own`, its part of those of its lane, of which there are so many.

    Where rank 0 has all of each page of layout `whole`, those of other lanes pass through the host's side of its cache,
    which is built on `memory` if there is such: it takes real memory only for pages that do.
    """
    is_door = ranks.rank == 0 and own == whole
    return KvCache(
        own,
        lane_pages,
        device,
        allocate=memory.allocate if memory and is_door else None,
        first_page=ranks.lane_number * lane_pages,
        num_host_pages=lane_pages * ranks.layout.num_lanes if is_door else 0,
    )


def rank_of_group(
    ranks: Ranks, cache: KvCache, whole: KvLayout, memory: Memfd | None, experts: GroupExperts | None = None
) -> RankOfGroup:
    """Return what a rank has whose part of pages of layout `whole` is in `cache`.

    `memory` is what other processes can be let read; the cache is built on it where every rank has all of each page.
    """
    share = PageShare(whole, ranks.layout, ranks.rank)
    moved, own = cache, cache.page_ids
    if not share.is_whole:
        own = range(0)
        if ranks.rank == 0:
            # Real memory only for the pages that are moved.
            num_pages = cache.num_pages * ranks.layout.num_lanes
            moved = KvCache(whole, num_pages, allocate=memory and memory.allocate)
    return RankOfGroup(ranks.world, RankPages(cache, share, ranks.world), GroupPages(moved, own=own), experts)


def redundant_experts(settings: WorkerSettings, layout: ParallelLayout) -> int | None:
    """Return how many replicas each layer of a group has; None: its experts stay, or there is no group.

    Raises:
        StartupError: BAD_RANKS, experts can't move so.
    """
    if layout.size == 1:
        return None
    if settings.rebalance == "off":
        if settings.redundant_experts:
            problem = "which nothing fills: give --rebalance auto, or leave it out"
            raise StartupError("BAD_RANKS", f"--redundant-experts {settings.redundant_experts} is room {problem}")
        return None
    if layout.experts_by is not ExpertsBy.EXPERT:
        problem = "moves whole experts, and with --experts tp every rank has a part of each: say --experts ep"
        raise StartupError("BAD_RANKS", f"--rebalance {settings.rebalance} {problem}")
    return settings.redundant_experts


def group_experts(settings: WorkerSettings, model: Model, ranks: Ranks) -> GroupExperts | None:
    """Return what this rank has of whole experts; None: it has parts of all, or there are none."""
    layout, moe = ranks.layout, model.config.moe
    if layout.experts_by is not ExpertsBy.EXPERT or not model.mixtures:
        return None
    slots = dict.fromkeys(model.mixtures, in_order(moe.num_experts, layout.size).ranks)
    own = RankExperts(
        slots,
        # All ranks of a lane have its tokens.
        model.take_expert_counts_since if layout.place(ranks.rank) == 0 else None,
        store=model.store,
        # Of a GPU the host sees launches alone.
        clock=StepClock([ranks.world, ranks.lane] if settings.device == "cpu" else []),
    )
    _, _, seconds = settings.rebalance.partition(":")
    period_s = None if model.store is None else float(seconds or _REBALANCE_S)
    return GroupExperts(own, Rule(period_s, network=Network(moe.num_groups, _num_nodes(ranks.world))))


def _num_nodes(world: RankGroup) -> int:
    """Return how many machines the ranks are on, if each has as many ranks in a row; else, or with one each, 1."""
    names = world.gather_bytes(socket.gethostname().encode())
    count = len(set(names))
    width = len(names) // count
    is_even = count * width == len(names) and all(
        len(set(names[at : at + width])) == 1 for at in range(0, len(names), width)
    )
    return count if is_even and width > 1 else 1


def join(settings: WorkerSettings, place: RankPlace) -> Ranks:
    """Meet the other ranks; alone, nobody is met.

    Raises:
        StartupError: BAD_TLS, encryption is asked for, and ranks are on several machines.
        StartupError, CheckpointError: as `served_layout`.
        UnavailableError: RANK_LOST, not all came.
    """
    if place.size == 1:
        return ALONE
    if settings.tls and not (place.is_one_machine or settings.ranks_in_clear):
        problem = "--tls asks for encryption, and what ranks on several machines say to each other has none"
        todo = (
            "keep the group on one machine, or its ranks on a network that nobody else is on, and say --ranks-in-clear"
        )
        raise StartupError("BAD_TLS", f"{problem}: {todo}")
    layout = served_layout(settings.model, place.size, attention_tp=settings.attention_tp, experts=settings.experts)
    log.info("meeting the other ranks", extra={"rank": place.rank, "ranks": place.size, "layout": str(layout)})
    ranks = join_ranks(layout, rank=place.rank, device=settings.device, timeout_s=settings.rank_start_timeout_s)
    return with_two_batches(ranks, settings.two_batch_rows)


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
