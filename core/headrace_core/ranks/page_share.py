"""Which part of a page a rank has: all of a latent, which is every head's, or some heads of keys and values.

Bytes only: what lies in a page is `kv.layout`'s to say. On the wire pages are whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from headrace_core.kv.layout import KeyValueAttention, KvLayout
from headrace_core.ranks.layout import ParallelLayout


@dataclass(frozen=True, slots=True)
class PageShare:
    """What `rank` has of pages of layout `whole`."""

    whole: KvLayout
    layout: ParallelLayout
    rank: int

    @property
    def is_whole(self) -> bool:
        """Whether every rank has all of each page."""
        return self.own == self.whole

    @property
    def own(self) -> KvLayout:
        """The layout of this rank's pages."""
        attention = self.whole.attention
        if not isinstance(attention, KeyValueAttention):
            return self.whole
        return replace(self.whole, attention=replace(attention, num_kv_heads=len(self._heads(self.rank))))

    def cut(self, page: memoryview | bytes, rank: int | None = None) -> bytes:
        """Return the part that `rank`, None: this one, has of one page of one layer: its own layout's bytes."""
        if self.is_whole:
            return bytes(page)
        return self._by_head(page)[:, :, _slice(self._heads(self.rank if rank is None else rank))].tobytes()

    def givers(self, lane: int) -> range:
        """Return the ranks of `lane` whose parts together are whole pages."""
        ranks = self.layout.lane_ranks(lane)
        return ranks[:1] if self.is_whole else ranks

    def join(self, page: memoryview, parts: Sequence[memoryview | bytes]) -> None:
        """Write one page of one layer, whole, from what its lane's `givers` have of it; equal parts may come twice."""
        if self.is_whole:
            page[:] = parts[0]
            return
        whole = self._by_head(page)
        for rank, part in enumerate(parts):
            heads = self._heads(rank)
            shape = (*whole.shape[:2], len(heads), whole.shape[3])
            whole[:, :, _slice(heads)] = np.frombuffer(part, np.uint8).reshape(shape)

    def _heads(self, rank: int) -> range:
        assert isinstance(self.whole.attention, KeyValueAttention), "latents are every head's"
        return self.layout.kv_heads(rank, self.whole.attention.num_kv_heads)

    def _by_head(self, page: memoryview | bytes) -> NDArray[np.uint8]:
        """View a whole page's bytes as [2, page size, heads, bytes of a head]."""
        return np.frombuffer(page, np.uint8).reshape(*self.whole.page_shape[:3], -1)


def _slice(heads: range) -> slice:
    return slice(heads.start, heads.stop)
