"""A sequence's pages: taken, grown, shared and given back in one place. Engine thread only.

The first `len(nodes)` pages of a sequence are shared ones of the prefix cache, read-only; the rest are its own.
`PageAllocator.free` is the only way back, whatever ended the sequence; `discard` for one whose pages may hold nonsense.

Where there are lanes, each has its own pages and a prefix cache of its own, and a sequence has all of its pages in one.
Which, `admit` chooses: what is cached of it, if that is half of it at least, draws it to a lane that is not much fuller
than another; else it goes where least is to compute, and then where most room is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
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
    lane: int = 0

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
    """Pages for sequences: a pool, and the prefix caches, one for each lane, that give way when it is empty."""

    def __init__(self, num_pages: int, page_size: int, *, num_lanes: int = 1, tells_cache: bool = False) -> None:
        """Args: `num_pages`: of all lanes; `tells_cache`: keep what `take_cache_changes` returns."""
        self.pool = PagePool(num_pages, num_lanes)
        self.page_size = page_size
        self._caches = [
            PrefixCache(self.pool, page_size, lane=lane, tells=tells_cache) for lane in range(self.num_lanes)
        ]
        self._refused: list[_Refused | None] = [None] * num_lanes
        self._num_holders = [0] * num_lanes
        """By lane, who holds pages there."""
        self._num_lanes_with: Counter[int] = Counter()
        """Of lanes that told: how many have a page cached, by its hash."""

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.pool.num_pages

    @property
    def num_lanes(self) -> int:
        """Lanes, of as many pages each."""
        return self.pool.num_lanes

    @property
    def lane_pages(self) -> int:
        """Pages of a lane: the most that a sequence can have."""
        return self.pool.lane_pages

    @property
    def num_available(self) -> int:
        """Pages that sequences could be given at once, of all lanes."""
        return self.pool.num_free + self.pool.num_unreferenced

    @property
    def most_available(self) -> int:
        """Pages that one sequence could be given at once."""
        return max(map(self.num_available_in, range(self.num_lanes)))

    def num_available_in(self, lane: int) -> int:
        """Return how many pages `reserve` could give a sequence of `lane` at once."""
        return self.pool.num_free_in(lane) + self.pool.num_unreferenced_in(lane)

    def take_cache_changes(self) -> list[tuple[int, bool]]:
        """See `PrefixCache.take_changes`; a page that several lanes have is cached until the last has it no more."""
        if self.num_lanes == 1:
            return self._caches[0].take_changes()
        before: dict[int, bool] = {}
        for cache in self._caches:
            for page, is_cached in cache.take_changes():
                before.setdefault(page, self._num_lanes_with[page] > 0)
                self._num_lanes_with[page] += 1 if is_cached else -1
        now = {page: self._num_lanes_with[page] > 0 for page in before}
        self._num_lanes_with = +self._num_lanes_with
        return [(page, is_cached) for page, is_cached in now.items() if is_cached is not before[page]]

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages hold `num_tokens`."""
        return -(-num_tokens // self.page_size)

    def match(self, owner: int, token_ids: Sequence[int], *, num_left: int = 1, lane: int = 0) -> SequencePages:
        """Return what `lane` has cached of the beginning of `token_ids`, the last `num_left` of them aside."""
        nodes = self._caches[lane].match(token_ids, self._most_matched(token_ids, num_left))
        self._num_holders[lane] += bool(nodes)
        return SequencePages(owner, [node.page_id for node in nodes], nodes, lane=lane)

    def match_longest(self, owner: int, token_ids: Sequence[int], *, num_left: int = 1) -> SequencePages:
        """Return `match` of the lane that has most of it."""
        lanes = range(self.num_lanes)
        lane = max(lanes, key=lambda lane: self._num_matched(token_ids, num_left, lane)) if len(lanes) > 1 else 0
        return self.match(owner, token_ids, num_left=num_left, lane=lane)

    def num_cached_tokens(self, token_ids: Sequence[int]) -> int:
        """Return how many tokens `match_longest` would find cached."""
        return max(self._num_matched(token_ids, 1, lane) for lane in range(self.num_lanes)) * self.page_size

    def admit(
        self,
        owner: int,
        token_ids: Sequence[int],
        *,
        num_left: int = 1,
        num_kept: Callable[[int], int] = lambda lane: 0,
        work: Callable[[int], int] = lambda lane: 0,
    ) -> SequencePages | None:
        """Return pages for all of `token_ids`, the first of them cached ones that leave `num_left` tokens at least.

        None: no lane has so many. That is remembered, so that asking again for this very list, before anything was
        given back that would change it, takes constant time: to match a long prompt takes milliseconds, which
        everybody in a step would wait for as long as it is first in the queue.

        Args:
            owner: whose they will be.
            token_ids: the sequence's.
            num_left: tokens that are not looked for in the cache.
            num_kept: says how many pages a lane keeps free.
            work: says how many tokens a lane has to compute, if lanes differ in that more than in their pages.
        """
        lanes = [lane for lane in range(self.num_lanes) if not self.is_refused(token_ids, lane)]
        for lane in self._preferred(lanes, token_ids, num_left, work):
            pages = self.match(owner, token_ids, num_left=num_left, lane=lane)
            num_new = self.pages_for(len(token_ids)) - len(pages.page_ids)
            if num_new + num_kept(lane) <= self.num_available_in(lane):
                self.reserve(pages, len(token_ids))
                return pages
            self.refuse(pages, token_ids, num_left=num_left)
        return None

    def _preferred(
        self, lanes: list[int], token_ids: Sequence[int], num_left: int, work: Callable[[int], int]
    ) -> list[int]:
        """Return the lanes, the one that the sequence goes to if it has room first."""
        if len(lanes) < 2:
            return lanes
        fewest, half = min(self._num_holders), len(token_ids) // (2 * self.page_size)

        def order(lane: int) -> tuple[int, int, int, int, int]:
            num_matched = self._num_matched(token_ids, num_left, lane)
            draws = num_matched >= max(half, 1) and self._num_holders[lane] <= 2 * fewest + 1
            room = self.num_available_in(lane)
            return -num_matched if draws else 0, work(lane), -room, self._num_holders[lane], lane

        return sorted(lanes, key=order)

    def refuse(self, pages: SequencePages, token_ids: Sequence[int], *, num_left: int = 1) -> None:
        """Give back what `match` found for a sequence that can't have the rest, and remember that."""
        nodes, lane = list(pages.nodes), pages.lane
        self.free(pages)
        most = self._most_matched(token_ids, num_left)
        self._refused[lane] = _Refused(token_ids, nodes, most, self.pool.num_returned[lane])

    def is_refused(self, token_ids: Sequence[int], lane: int = 0) -> bool:
        """Return whether the lane last refused this very list, and would have to again; in constant time.

        So it is while no page of it was given back and its cache finds what it found.
        """
        refused = self._refused[lane]
        return (
            refused is not None
            and refused.token_ids is token_ids
            and refused.num_returned == self.pool.num_returned[lane]
            and self._caches[lane].would_match(refused.nodes, token_ids, refused.most_nodes)
        )

    def reserve(self, pages: SequencePages, num_tokens: int) -> None:
        """Add own pages until `num_tokens` fit; cached pages nobody uses are evicted to make room.

        Raises:
            OverloadedError: NO_FREE_PAGES; `pages` is unchanged.
        """
        count, lane = self.pages_for(num_tokens) - len(pages.page_ids), pages.lane
        if count <= 0:
            return
        num_available = self.num_available_in(lane)
        if count > num_available:
            raise OverloadedError(
                "NO_FREE_PAGES", f"{count} pages needed, {num_available} of {self.lane_pages} available"
            )
        self._num_holders[lane] += not pages.page_ids
        self._caches[lane].evict(count - self.pool.num_free_in(lane))
        pages.page_ids += self.pool.allocate(count, pages.owner, lane)

    def commit(
        self, pages: SequencePages, token_ids: Sequence[int], num_computed: int, *, keeps_ids: bool = False
    ) -> None:
        """Give the full pages among the first `num_computed` tokens to the prefix cache, keeping references.

        May replace a page id by that of an equal page that was cached first; with `keeps_ids`, because somebody was
        told of these pages, that page and those after it stay the sequence's own instead.
        """
        cache = self._caches[pages.lane]
        for index in range(len(pages.nodes), num_computed // self.page_size):
            parent = pages.nodes[-1] if pages.nodes else None
            if keeps_ids and cache.has(parent, token_ids, index):
                return
            node = cache.insert(parent, token_ids, index, page_id=pages.page_ids[index], owner=pages.owner)
            pages.nodes.append(node)
            pages.page_ids[index] = node.page_id

    def quarantine(self, pages: SequencePages) -> None:
        """Set the sequence's own pages aside until `free`: a cancelled transfer may still write to them."""
        self.pool.quarantine(pages.own_page_ids, pages.owner)
        pages.is_quarantined = True

    def free(self, pages: SequencePages) -> None:
        """Give everything back: references to shared pages, and own pages."""
        self._num_holders[pages.lane] -= bool(pages.page_ids)
        self.pool.free(pages.own_page_ids, pages.owner)
        self._caches[pages.lane].release(pages.nodes)
        pages.page_ids, pages.nodes = [], []

    def discard(self, pages: SequencePages) -> None:
        """Give everything back like `free`, and let nobody find what was computed there who does not use it already.

        For a sequence that failed by what it read or wrote: the next one with its prefix computes it again.
        """
        nodes = list(pages.nodes)
        self.free(pages)
        self._caches[pages.lane].forget(nodes)

    def _num_matched(self, token_ids: Sequence[int], num_left: int, lane: int) -> int:
        return self._caches[lane].num_matched(token_ids, self._most_matched(token_ids, num_left))

    def _most_matched(self, token_ids: Sequence[int], num_left: int) -> int:
        return (len(token_ids) - num_left) // self.page_size

    def check_integrity(self) -> None:
        """Assert that no page is lost or held twice."""
        self.pool.check_integrity()
        for cache in self._caches:
            cache.check_integrity()
