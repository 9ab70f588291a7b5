"""Full pages found again by the tokens they hold. Pure bookkeeping; engine thread only.

A tree: an edge is the exact tuple of a page's tokens, so a node stands for one exact token prefix. Nothing is
hashed that could collide into another prompt's page. A sequence that uses a node's page uses its ancestors' too,
so an unreferenced node has only unreferenced descendants, and eviction takes leaves, the longest unused first.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace_core.kv.page_hash import NO_PAGES, page_hash
from headrace_core.kv.page_pool import PagePool


@dataclass(eq=False, slots=True)
class PrefixNode:
    """A cached page and where it hangs."""

    parent: PrefixNode | None
    token_ids: tuple[int, ...]
    page_id: int
    hash: int
    """For others, if they are told what is cached."""
    children: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict[tuple[int, ...], "PrefixNode"])
    last_used: int = 0
    is_evicted: bool = False


class PrefixCache:
    """The tree over the cached pages of one lane of a pool."""

    def __init__(self, pool: PagePool, page_size: int, *, lane: int = 0, tells: bool = False) -> None:
        """Args: `tells`: keep what `take_changes` returns, for which each page is hashed."""
        self._tells = tells
        self._pool = pool
        self._lane = lane
        self._page_size = page_size
        self._root = PrefixNode(None, (), -1, NO_PAGES)
        self._changed: dict[int, bool] = {}
        """By hash, since `take_changes`: pages that are cached (True) or no more."""
        self._clock = 0
        self._tie = itertools.count()
        # (last_used, tie-breaker, node); entries go stale when a node is used again, and are skipped when popped.
        self._leaves: list[tuple[int, int, PrefixNode]] = []

    def match(self, token_ids: Sequence[int], max_pages: int) -> list[PrefixNode]:
        """Return the nodes of the longest cached prefix, at most `max_pages`, each with a reference for the caller."""
        nodes: list[PrefixNode] = []
        node = self._root
        for index in range(min(max_pages, len(token_ids) // self._page_size)):
            child = node.children.get(self._edge(token_ids, index))
            if child is None:
                break
            self._pool.retain(child.page_id)
            nodes.append(child)
            node = child
        return nodes

    def num_matched(self, token_ids: Sequence[int], max_pages: int) -> int:
        """Return how many nodes `match` would find."""
        node = self._root
        for index in range(min(max_pages, len(token_ids) // self._page_size)):
            child = node.children.get(self._edge(token_ids, index))
            if child is None:
                return index
            node = child
        return max(0, min(max_pages, len(token_ids) // self._page_size))

    def would_match(self, nodes: Sequence[PrefixNode], token_ids: Sequence[int], max_pages: int) -> bool:
        """Return whether `match` would find the same `nodes` again; in constant time. They may be unreferenced."""
        last, index = nodes[-1] if nodes else self._root, len(nodes)
        # A page is evicted before those that it hangs on.
        return not last.is_evicted and (index >= max_pages or self._edge(token_ids, index) not in last.children)

    def has(self, parent: PrefixNode | None, token_ids: Sequence[int], index: int) -> bool:
        """Return whether page number `index` of a sequence is cached already; `parent` as for `insert`."""
        return self._edge(token_ids, index) in (parent or self._root).children

    def insert(
        self, parent: PrefixNode | None, token_ids: Sequence[int], index: int, *, page_id: int, owner: int
    ) -> PrefixNode:
        """Make page number `index` of a sequence, owned by `owner` and full, a cached one; the owner keeps a reference.

        If the prefix is cached already, the owner's page is freed and the cached one referenced in its place: the
        caller must use the returned node's `page_id` from now on. `parent` is the node of page `index - 1`.
        """
        node = parent or self._root
        edge = self._edge(token_ids, index)
        known = node.children.get(edge)
        if known is not None:
            self._pool.retain(known.page_id)
            self._pool.free([page_id], owner)
            return known
        self._pool.share(page_id, owner)
        child = PrefixNode(node, edge, page_id, page_hash(node.hash, edge) if self._tells else NO_PAGES)
        node.children[edge] = child
        self._note(child, is_cached=True)
        return child

    def release(self, nodes: Sequence[PrefixNode]) -> None:
        """Drop a sequence's references to its nodes, given from the first page to the last."""
        self._clock += 1
        for node in reversed(nodes):
            node.last_used = self._clock
            self._pool.release(node.page_id)
            self._offer(node)

    def evict(self, count: int) -> int:
        """Free up to `count` pages that nobody uses, the longest unused first; return how many."""
        num_evicted = 0
        while num_evicted < count and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            if last_used != node.last_used or not self._is_evictable(node):
                continue
            self._evict(node)
            num_evicted += 1
        return num_evicted

    def forget(self, nodes: Sequence[PrefixNode]) -> None:
        """Evict those of a sequence's nodes, given from the first page to the last, that nobody uses or builds on."""
        for node in reversed(nodes):
            if self._is_evictable(node):
                self._evict(node)

    def take_changes(self) -> list[tuple[int, bool]]:
        """Return which pages are cached (True) or no more since the last call, by their hashes, a page at most once."""
        changes, self._changed = list(self._changed.items()), {}
        return changes

    def check_integrity(self) -> None:
        """Assert that the tree and the pool agree. Linear in the tree."""
        seen: set[int] = set()
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            assert node.page_id not in seen, f"page {node.page_id} hangs twice"
            seen.add(node.page_id)
            for child in node.children.values():
                assert self._pool.references(node.page_id) >= self._pool.references(child.page_id), "orphaned reference"
            stack += node.children.values()
        of_lane = self._pool.lane_range(self._lane)
        assert seen <= set(of_lane), "a page of another lane is in the tree"
        num_cached = sum(1 for page_id in of_lane if self._pool.state(page_id).value == "cached")
        assert num_cached == len(seen), "a cached page is not in the tree"

    def _note(self, node: PrefixNode, *, is_cached: bool) -> None:
        # What came and went, or went and came, did not change: so this never holds more than twice the pool.
        if self._tells and self._changed.pop(node.hash, is_cached) is is_cached:
            self._changed[node.hash] = is_cached

    def _edge(self, token_ids: Sequence[int], index: int) -> tuple[int, ...]:
        return tuple(token_ids[index * self._page_size : (index + 1) * self._page_size])

    def _evict(self, node: PrefixNode) -> None:
        assert node.parent is not None, "the root is never evicted"
        del node.parent.children[node.token_ids]
        node.is_evicted = True
        self._note(node, is_cached=False)
        self._pool.evict(node.page_id)
        self._offer(node.parent)

    def _is_evictable(self, node: PrefixNode) -> bool:
        return not node.is_evicted and not node.children and not self._pool.references(node.page_id)

    def _offer(self, node: PrefixNode) -> None:
        if node is self._root or not self._is_evictable(node):
            return
        if len(self._leaves) > 2 * self._pool.lane_pages:
            self._drop_stale_leaves()
        heapq.heappush(self._leaves, (node.last_used, next(self._tie), node))

    def _drop_stale_leaves(self) -> None:
        """Keep one entry for each evictable leaf, so that the heap stays as small as the pool."""
        fresh = {
            id(node): (last_used, tie, node)
            for last_used, tie, node in self._leaves
            if last_used == node.last_used and self._is_evictable(node)
        }
        self._leaves = list(fresh.values())
        heapq.heapify(self._leaves)
