"""Who owns each page of the cache. Pure bookkeeping; engine thread only.

    FREE ──allocate──► OWNED ──share──► CACHED (reference-counted) ──evict, at 0 references──► FREE
                         │ ──free──────────────────────────────────────────────────────────► FREE
                         └──quarantine──► QUARANTINED ──free──────────────────────────────► FREE

An OWNED page has one owner, its only writer. A CACHED page is read-only and belongs to the prefix cache; sequences
hold references. A QUARANTINED page may still be written by a cancelled transfer: nobody gets it until its owner says
that the transfer is drained. Every way to FREE bumps the page's generation, and so does `renew`: that a page is not the
one that was told is visible to whoever remembers it by (id, generation).

Where attention has lanes (`ranks.layout`) each has as many of the ids, one after another: lane i those from
i · `lane_pages` on. A page is in the memory of its lane's ranks, so nobody gets it for another lane.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from headrace_core.errors import OverloadedError


class PageState(Enum):
    """Where a page is in its life; the value is the metric label."""

    FREE = "free"
    OWNED = "owned"
    CACHED = "cached"
    QUARANTINED = "quarantined"


_NOBODY = -1


class PagePool:
    """Pages 0 ... num_pages-1. Misuse is a bug of ours, hence assertions; only running out of pages is an error."""

    def __init__(self, num_pages: int, num_lanes: int = 1) -> None:
        assert num_pages > 0, "a pool needs pages"
        assert num_pages % num_lanes == 0, "lanes have as many pages each"
        self.num_pages = num_pages
        self.num_lanes = num_lanes
        self.lane_pages = num_pages // num_lanes
        """Pages of each lane."""
        self._free = [list(reversed(self.lane_range(lane))) for lane in range(num_lanes)]
        self._states = [PageState.FREE] * num_pages
        self._owners = [_NOBODY] * num_pages
        self._references = [0] * num_pages
        self._generations = [0] * num_pages
        self._num_cached = 0
        self._num_quarantined = 0
        self._num_unreferenced = [0] * num_lanes
        self.num_returned = [0] * num_lanes
        """By lane, how often a page or a reference was given back: what is available has not grown while it stays."""

    def lane_range(self, lane: int) -> range:
        """Return the ids of a lane's pages."""
        return range(lane * self.lane_pages, (lane + 1) * self.lane_pages)

    @property
    def num_free(self) -> int:
        """Pages nobody has."""
        return sum(map(len, self._free))

    def num_free_in(self, lane: int) -> int:
        """Return how many of a lane's pages nobody has."""
        return len(self._free[lane])

    @property
    def num_unreferenced(self) -> int:
        """Cached pages that no sequence uses."""
        return sum(self._num_unreferenced)

    def num_unreferenced_in(self, lane: int) -> int:
        """Return how many of a lane's pages are cached and used by no sequence; they can be evicted."""
        return self._num_unreferenced[lane]

    def state(self, page_id: int) -> PageState:
        """Return the page's state."""
        return self._states[page_id]

    def references(self, page_id: int) -> int:
        """Return how many sequences use the cached page."""
        return self._references[page_id]

    def generation(self, page_id: int) -> int:
        """Return the page's generation. Any thread."""
        return self._generations[page_id]

    def counts(self) -> dict[PageState, int]:
        """Return how many pages are in each state; they sum to `num_pages`."""
        num_free = self.num_free
        num_owned = self.num_pages - num_free - self._num_cached - self._num_quarantined
        return {
            PageState.FREE: num_free,
            PageState.OWNED: num_owned,
            PageState.CACHED: self._num_cached,
            PageState.QUARANTINED: self._num_quarantined,
        }

    def allocate(self, count: int, owner: int, lane: int = 0) -> list[int]:
        """Give `count` free pages of `lane` to `owner` (at least 0).

        Raises:
            OverloadedError: NO_FREE_PAGES; nothing was allocated.
        """
        free = self._free[lane]
        if count > len(free):
            raise OverloadedError(
                "NO_FREE_PAGES", f"{count} pages needed, {len(free)} of {self.lane_pages} free; try again later"
            )
        assert owner >= 0, "owners are not negative"
        page_ids = [free.pop() for _ in range(count)]
        for page_id in page_ids:
            self._states[page_id] = PageState.OWNED
            self._owners[page_id] = owner
        return page_ids

    def free(self, page_ids: Iterable[int], owner: int) -> None:
        """Take owned or quarantined pages back from `owner`."""
        for page_id in page_ids:
            assert self._states[page_id] in (PageState.OWNED, PageState.QUARANTINED), f"page {page_id} is not owned"
            assert self._owners[page_id] == owner, f"page {page_id} is not {owner}'s"
            self._num_quarantined -= self._states[page_id] is PageState.QUARANTINED
            self.num_returned[self._lane(page_id)] += 1
            self._put_back(page_id)

    def quarantine(self, page_ids: Iterable[int], owner: int) -> None:
        """Set owned pages aside until `free`: bytes may still land in them."""
        for page_id in page_ids:
            assert self._states[page_id] is PageState.OWNED, f"page {page_id} is not owned"
            assert self._owners[page_id] == owner, f"page {page_id} is not {owner}'s"
            self._states[page_id] = PageState.QUARANTINED
            self._num_quarantined += 1

    def renew(self, page_ids: Iterable[int], owner: int) -> None:
        """Make owned pages others than those that somebody was told of, in the same place: they are written again."""
        for page_id in page_ids:
            assert self._states[page_id] is PageState.OWNED, f"page {page_id} is not owned"
            assert self._owners[page_id] == owner, f"page {page_id} is not {owner}'s"
            self._generations[page_id] += 1

    def share(self, page_id: int, owner: int) -> None:
        """Make an owned page a cached one, of which its former owner holds the first reference."""
        assert self._states[page_id] is PageState.OWNED, f"page {page_id} is not owned"
        assert self._owners[page_id] == owner, f"page {page_id} is not {owner}'s"
        self._states[page_id] = PageState.CACHED
        self._num_cached += 1
        self._owners[page_id] = _NOBODY
        self._references[page_id] = 1

    def retain(self, page_id: int) -> None:
        """Add a reference to a cached page."""
        assert self._states[page_id] is PageState.CACHED, f"page {page_id} is not cached"
        if not self._references[page_id]:
            self._num_unreferenced[self._lane(page_id)] -= 1
        self._references[page_id] += 1

    def release(self, page_id: int) -> None:
        """Drop a reference to a cached page; the page stays cached."""
        assert self._references[page_id] > 0, f"page {page_id} has no references"
        lane = self._lane(page_id)
        self._references[page_id] -= 1
        if not self._references[page_id]:
            self._num_unreferenced[lane] += 1
        self.num_returned[lane] += 1

    def evict(self, page_id: int) -> None:
        """Free a cached page that nobody references."""
        assert self._states[page_id] is PageState.CACHED, f"page {page_id} is not cached"
        assert not self._references[page_id], f"page {page_id} is in use"
        self._num_cached -= 1
        self._num_unreferenced[self._lane(page_id)] -= 1
        self._put_back(page_id)

    def check_integrity(self) -> None:
        """Assert that every page is somewhere exactly once. Linear in the pool; for tests and drained engines."""
        free = [page_id for of_lane in self._free for page_id in of_lane]
        assert len(set(free)) == len(free), "a page is free twice"
        for lane, of_lane in enumerate(self._free):
            assert set(of_lane) <= set(self.lane_range(lane)), "a page is free in another's lane"
        assert self.counts() == {state: self._states.count(state) for state in PageState}, "pages are miscounted"
        num_unreferenced = [0] * self.num_lanes
        for page_id, state in enumerate(self._states):
            has_owner = state in (PageState.OWNED, PageState.QUARANTINED)
            assert (self._owners[page_id] != _NOBODY) == has_owner, f"page {page_id}: owner does not fit {state}"
            assert not self._references[page_id] or state is PageState.CACHED, f"page {page_id}: stray references"
            num_unreferenced[self._lane(page_id)] += state is PageState.CACHED and not self._references[page_id]
        free_ids = {page_id for page_id, state in enumerate(self._states) if state is PageState.FREE}
        assert free_ids == set(free), "the free list and the states differ"
        assert num_unreferenced == self._num_unreferenced, "unreferenced pages are miscounted"

    def _put_back(self, page_id: int) -> None:
        self._states[page_id] = PageState.FREE
        self._owners[page_id] = _NOBODY
        self._generations[page_id] += 1
        self._free[self._lane(page_id)].append(page_id)

    def _lane(self, page_id: int) -> int:
        return page_id // self.lane_pages
