"""A sequence's pages: taken, grown, shared and given back in one place. Engine thread only.

The first `len(nodes)` pages of a sequence are shared ones of the prefix cache, read-only; the rest are its own.
`PageAllocator.free` is the only way back, whatever ended the sequence; `discard` for one whose pages may hold nonsense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace_core.errors import OverloadedError
from headrace_core.kv.page_pool import PagePool
from headrace_core.kv.prefix_cache import PrefixCache, PrefixNode


@dataclass(slots=True)
class SequencePages:
    """What one sequence holds; `page_ids` in order of position."""

    owner: int
    page_ids: list[int] = field(default_factory=list[int])
    nodes: list[PrefixNode] = field(default_factory=list[PrefixNode])
    is_quarantined: bool = False

    @property
    def own_page_ids(self) -> list[int]:
        """The pages that nobody else may read or write."""
        return self.page_ids[len(self.nodes) :]


@dataclass(frozen=True, slots=True)
class _Refused:
    """A sequence there was no room for: its tokens, the cached pages it would use, at most how many, `num_returned`."""

    token_ids: Sequence[int]
    nodes: list[PrefixNode]
    most_nodes: int
    num_returned: int


class PageAllocator:
    """Pages for sequences: a pool, and the prefix cache that gives way when the pool is empty."""

    def __init__(self, num_pages: int, page_size: int, *, tells_cache: bool = False) -> None:
        """Args: `tells_cache`: keep what `take_cache_changes` returns."""
        self.pool = PagePool(num_pages)
        self.page_size = page_size
        self._cache = PrefixCache(self.pool, page_size, tells=tells_cache)
        self._refused: _Refused | None = None

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.pool.num_pages

    @property
    def num_available(self) -> int:
        """Pages that `reserve` could give at once."""
        return self.pool.num_free + self.pool.num_unreferenced

    def take_cache_changes(self) -> list[tuple[int, bool]]:
        """See `PrefixCache.take_changes`."""
        return self._cache.take_changes()

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages hold `num_tokens`."""
        return -(-num_tokens // self.page_size)

    def match(self, owner: int, token_ids: Sequence[int], *, num_left: int = 1) -> SequencePages:
        """Return the cached pages of the longest prefix of `token_ids` that leaves `num_left` tokens, at least."""
        nodes = self._cache.match(token_ids, self._most_matched(token_ids, num_left))
        return SequencePages(owner, [node.page_id for node in nodes], nodes)

    def num_cached_tokens(self, token_ids: Sequence[int]) -> int:
        """Return how many tokens `match` would find cached."""
        return self._cache.num_matched(token_ids, self._most_matched(token_ids, 1)) * self.page_size

    def refuse(self, pages: SequencePages, token_ids: Sequence[int], *, num_left: int = 1) -> None:
        """Give back what `match` found for a sequence that can't have the rest, and remember that for `is_refused`."""
        nodes = list(pages.nodes)
        self.free(pages)
        most = self._most_matched(token_ids, num_left)
        self._refused = _Refused(token_ids, nodes, most, self.pool.num_returned)

    def is_refused(self, token_ids: Sequence[int]) -> bool:
        """Return whether `refuse` was last called for this very list, and would have to be again; in constant time.

        So it is while no page was given back and the cache finds what it found. To match a long prompt takes
        milliseconds, which everybody in a step would wait for as long as it is first in the queue.
        """
        refused = self._refused
        return (
            refused is not None
            and refused.token_ids is token_ids
            and refused.num_returned == self.pool.num_returned
            and self._cache.would_match(refused.nodes, token_ids, refused.most_nodes)
        )

    def reserve(self, pages: SequencePages, num_tokens: int) -> None:
        """Add own pages until `num_tokens` fit; cached pages nobody uses are evicted to make room.

        Raises:
            OverloadedError: NO_FREE_PAGES; `pages` is unchanged.
        """
        count = self.pages_for(num_tokens) - len(pages.page_ids)
        if count <= 0:
            return
        if count > self.num_available:
            raise OverloadedError(
                "NO_FREE_PAGES", f"{count} pages needed, {self.num_available} of {self.num_pages} available"
            )
        self._cache.evict(count - self.pool.num_free)
        pages.page_ids += self.pool.allocate(count, pages.owner)

    def commit(
        self, pages: SequencePages, token_ids: Sequence[int], num_computed: int, *, keeps_ids: bool = False
    ) -> None:
        """Give the full pages among the first `num_computed` tokens to the prefix cache, keeping references.

        May replace a page id by that of an equal page that was cached first; with `keeps_ids`, because somebody was
        told of these pages, that page and those after it stay the sequence's own instead.
        """
        for index in range(len(pages.nodes), num_computed // self.page_size):
            parent = pages.nodes[-1] if pages.nodes else None
            if keeps_ids and self._cache.has(parent, token_ids, index):
                return
            node = self._cache.insert(parent, token_ids, index, page_id=pages.page_ids[index], owner=pages.owner)
            pages.nodes.append(node)
            pages.page_ids[index] = node.page_id

    def quarantine(self, pages: SequencePages) -> None:
        """Set the sequence's own pages aside until `free`: a cancelled transfer may still write to them."""
        self.pool.quarantine(pages.own_page_ids, pages.owner)
        pages.is_quarantined = True

    def free(self, pages: SequencePages) -> None:
        """Give everything back: references to shared pages, and own pages."""
        self.pool.free(pages.own_page_ids, pages.owner)
        self._cache.release(pages.nodes)
        pages.page_ids, pages.nodes = [], []

    def discard(self, pages: SequencePages) -> None:
        """Give everything back like `free`, and let nobody find what was computed there who does not use it already.

        For a sequence that failed by what it read or wrote: the next one with its prefix computes it again.
        """
        nodes = list(pages.nodes)
        self.free(pages)
        self._cache.forget(nodes)

    def _most_matched(self, token_ids: Sequence[int], num_left: int) -> int:
        return (len(token_ids) - num_left) // self.page_size

    def check_integrity(self) -> None:
        """Assert that no page is lost or held twice."""
        self.pool.check_integrity()
        self._cache.check_integrity()
