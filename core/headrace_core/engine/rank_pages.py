"""One rank's pages, as the group sees them: it has its part of those of its lane, and rank 0 gives and collects parts.

Rank 0 has said which pages (`Pages`, `Ask`), and all meet in one exchange: what is no rank's travels to none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headrace_core.engine.group_messages import Ask, Pages
from headrace_core.model.kv_cache import KvCache
from headrace_core.ranks.group import RankGroup
from headrace_core.ranks.page_share import PageShare
from headrace_core.transfer.memory import PageMemory


class RankPages:
    """See the module. Engine thread only."""

    def __init__(self, cache: KvCache, share: PageShare, ranks: RankGroup) -> None:
        assert cache.layout == share.own, "the cache is this rank's part"
        self._cache = cache
        self._share = share
        self._ranks = ranks
        self._size = share.own.page_layer_bytes

    def is_others(self, page_ids: Sequence[int]) -> bool:
        """Return whether another rank than 0 has a part of these pages."""
        lane = self._share.layout.lane_ranks(0)
        return len(lane) > 1 or len(self._of_rank(0, page_ids)) < len(page_ids)

    def give_out(self, pages: Pages, memory: PageMemory) -> None:
        """Rank 0: give each rank its part of these pages, whole in `memory`, and have its own in the cache."""
        share, layers, size = self._share, layers_of(pages), self._ranks.size
        parts = [
            b"".join(share.cut(memory.page_bytes(*cell), rank) for cell in cells(layers, self._of_rank(rank, pages)))
            for rank in range(1, size)
        ]
        self._ranks.exchange(self._rows(b"".join(parts)), [0, *(len(part) // self._size for part in parts)], [0] * size)
        if not share.is_whole:
            own = self._of_rank(0, pages)
            self._have(own, layers, [share.cut(memory.page_bytes(*cell)) for cell in cells(layers, own)])

    def take(self, pages: Pages) -> None:
        """Another rank: have its part of these pages in the cache."""
        own, layers, size = self._of_rank(self._share.rank, pages), layers_of(pages), self._ranks.size
        receive = [pages.num_layers * len(own), *[0] * (size - 1)]
        came = self._ranks.exchange(self._rows(b""), [0] * size, receive)
        self._have(own, layers, [row.numpy().data for row in came])

    def give(self, ask: Ask) -> None:
        """Another rank: give rank 0 its part of these pages, as they are now, if it needs that."""
        lane, size = self._share.layout.lane(self._share.rank), self._ranks.size
        is_giver = self._share.rank in self._share.givers(lane)
        own = self._rows(self._own_part(ask) if is_giver else b"")
        self._ranks.exchange(own, [len(own), *[0] * (size - 1)], [0] * size)

    def collect(self, ask: Ask, memory: PageMemory) -> None:
        """Rank 0: put these pages together in `memory`, whole, from what the ranks give that have them."""
        share, size = self._share, self._ranks.size
        by_rank = [self._of_rank(rank, ask) for rank in range(size)]
        givers = {rank for lane in range(share.layout.num_lanes) for rank in share.givers(lane)}
        receive = [ask.num_layers * len(ids) if rank in givers else 0 for rank, ids in enumerate(by_rank)]
        receive[0] = 0  # what it has itself travels nowhere
        came = self._ranks.exchange(self._rows(b""), [0] * size, receive).split(receive)
        given = [self._rows(self._own_part(ask)), *came[1:]]
        for lane in range(share.layout.num_lanes):
            ranks = share.givers(lane)
            if memory is self._cache and 0 in ranks:
                continue  # they are there
            of_cells = zip(*(given[rank] for rank in ranks), strict=True)
            for cell, parts in zip(cells(layers_of(ask), by_rank[ranks[0]]), of_cells, strict=True):
                share.join(memory.page_bytes(*cell), [part.numpy().data for part in parts])

    def _of_rank(self, rank: int, pages: Pages | Ask | Sequence[int]) -> list[int]:
        """Return those of the pages that are in the lane of `rank`; every lane has as many as this rank has here."""
        page_ids = pages.page_ids if isinstance(pages, Pages | Ask) else pages
        lane = self._share.layout.lane(rank)
        return [page_id for page_id in page_ids if page_id // self._cache.num_pages == lane]

    def _own_part(self, ask: Ask) -> bytes:
        own, layers = self._of_rank(self._share.rank, ask), layers_of(ask)
        self._cache.copy_to_host(own, layers)
        return b"".join(self._cache.page_bytes(*cell) for cell in cells(layers, own))

    def _have(self, page_ids: Sequence[int], layers: range, parts: Sequence[bytes | memoryview]) -> None:
        for cell, part in zip(cells(layers, page_ids), parts, strict=True):
            self._cache.page_bytes(*cell)[:] = part
        self._cache.copy_from_host(page_ids, layers)

    def _rows(self, content: bytes) -> Tensor:
        """Return parts of pages as they travel: [parts, bytes of one]."""
        if not content:
            return torch.empty((0, self._size), dtype=torch.uint8)
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, self._size)


def layers_of(message: Pages | Ask) -> range:
    """Return the layers that a message is of."""
    return range(message.first_layer, message.first_layer + message.num_layers)


def cells(layers: range, page_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return (layer, page id) in the order of what travels."""
    return ((layer, page_id) for layer in layers for page_id in page_ids)
