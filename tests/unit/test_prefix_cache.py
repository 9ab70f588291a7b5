"""What the prefix cache finds, and what it gives up first."""

import pytest
from headrace_core.errors import OverloadedError
from headrace_core.kv.page_hash import page_hashes
from headrace_core.kv.page_pool import PagePool, PageState
from headrace_core.kv.prefix_cache import PrefixCache, PrefixNode
from headrace_core.kv.sequence_pages import PageAllocator
from hypothesis import given
from hypothesis import strategies as st

PAGE = 4


def fill(allocator: PageAllocator, owner: int, tokens: list[int]) -> list[int]:
    """Compute a sequence and give it back; return its pages."""
    pages = allocator.match(owner, tokens)
    allocator.reserve(pages, len(tokens))
    allocator.commit(pages, tokens, len(tokens))
    page_ids = list(pages.page_ids)
    allocator.free(pages)
    return page_ids


def test_a_second_sequence_shares_full_pages_of_the_same_prefix():
    allocator = PageAllocator(8, PAGE)
    first = fill(allocator, 1, list(range(10)))
    found = allocator.match(2, [*range(8), 99, 98, 97])
    assert found.page_ids == first[:2]
    assert not found.own_page_ids


def test_the_last_token_is_always_left_to_compute():
    allocator = PageAllocator(8, PAGE)
    fill(allocator, 1, list(range(8)))
    assert len(allocator.match(2, list(range(8))).page_ids) == 1


def test_the_same_page_after_another_prefix_is_another_page():
    allocator = PageAllocator(8, PAGE)
    fill(allocator, 1, [1, 1, 1, 1, 5, 5, 5, 5, 0])
    assert allocator.match(2, [2, 2, 2, 2, 5, 5, 5, 5, 0]).page_ids == []


def test_the_longest_unused_leaf_goes_first_and_parents_after_children():
    allocator = PageAllocator(4, PAGE)
    old = fill(allocator, 1, [1] * 8)
    new = fill(allocator, 2, [2] * 8)
    fresh = allocator.match(3, [3])
    allocator.reserve(fresh, 1)
    assert fresh.page_ids == [old[1]]
    assert allocator.match(4, [1] * 8).page_ids == [old[0]]
    assert allocator.match(5, [2] * 9).page_ids == new


def test_pages_in_use_are_not_evicted():
    allocator = PageAllocator(2, PAGE)
    tokens = [1] * 8
    pages = allocator.match(1, tokens)
    allocator.reserve(pages, 8)
    allocator.commit(pages, tokens, 8)
    with pytest.raises(OverloadedError):
        allocator.reserve(allocator.match(2, [2]), 1)
    allocator.free(pages)
    allocator.reserve(allocator.match(2, [2]), 1)


def test_equal_pages_computed_at_once_are_kept_once():
    allocator = PageAllocator(8, PAGE)
    tokens = [1] * 8
    one, two = allocator.match(1, tokens), allocator.match(2, tokens)
    for pages in (one, two):
        allocator.reserve(pages, 8)
    allocator.commit(one, tokens, 8)
    allocator.commit(two, tokens, 8)
    assert two.page_ids == one.page_ids
    allocator.free(one)
    allocator.free(two)
    allocator.check_integrity()
    assert allocator.num_available == 8


def test_discarded_pages_are_free_at_once_and_not_found_again_but_for_those_that_others_use():
    allocator = PageAllocator(8, PAGE)
    tokens = [1] * 12
    pages = allocator.match(1, tokens)
    allocator.reserve(pages, 12)
    allocator.commit(pages, tokens, 9)
    user = allocator.match(2, tokens[:5])
    allocator.discard(pages)
    allocator.check_integrity()
    assert allocator.pool.num_free == 7
    found = allocator.match(3, tokens)
    assert found.page_ids == user.page_ids
    allocator.free(found)
    allocator.discard(user)
    allocator.check_integrity()
    assert allocator.pool.num_free == 8


def test_a_hot_prefix_does_not_grow_the_books():
    allocator = PageAllocator(4, PAGE)
    for owner in range(1000):
        fill(allocator, owner, [1] * 9)
    assert len(allocator._caches[0]._leaves) <= 2 * 4 + 2


def node_of(cache: PrefixCache, tokens: list[int]) -> PrefixNode:
    """Return the node of exactly these tokens, without using it."""
    node = cache._root
    for start in range(0, len(tokens), PAGE):
        node = node.children[tuple(tokens[start : start + PAGE])]
    return node


def cached(pool: PagePool, cache: PrefixCache, tokens: list[int], owner: int = 1) -> list[PrefixNode]:
    """File the pages of `tokens`, whole ones; return their nodes, with a reference each."""
    nodes = cache.match(tokens, len(tokens) // PAGE)
    for index in range(len(nodes), len(tokens) // PAGE):
        (page_id,) = pool.allocate(1, owner)
        parent = nodes[-1] if nodes else None
        nodes.append(cache.insert(parent, tokens, index, page_id=page_id, owner=owner))
    return nodes


def test_a_match_is_as_long_as_the_caller_allows_and_the_tokens_reach():
    pool = PagePool(8)
    cache = PrefixCache(pool, PAGE)
    tokens = list(range(12))
    nodes = cached(pool, cache, tokens)
    assert cache.match(tokens, 0) == []
    assert cache.match(tokens, 2) == nodes[:2]
    assert cache.match(tokens[:11], 9) == nodes[:2]
    assert cache.match(tokens, 9) == nodes
    assert [pool.references(node.page_id) for node in nodes] == [4, 4, 2]


def test_a_match_ends_at_the_first_page_that_differs():
    pool = PagePool(8)
    cache = PrefixCache(pool, PAGE)
    nodes = cached(pool, cache, [*range(4), *range(4), *range(4)])
    assert cache.match([*range(4), 9, 9, 9, 9, *range(4)], 3) == nodes[:1]


def test_a_page_is_filed_under_its_own_tokens_and_its_parent():
    pool = PagePool(8)
    cache = PrefixCache(pool, PAGE)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    first, second = cached(pool, cache, tokens)
    assert (first.token_ids, second.token_ids) == ((1, 2, 3, 4), (5, 6, 7, 8))
    assert second.parent is first
    assert pool.state(second.page_id) is PageState.CACHED
    assert cache.match([5, 6, 7, 8], 1) == []


def test_a_page_cached_already_takes_the_place_of_its_equal():
    pool = PagePool(3)
    cache = PrefixCache(pool, PAGE)
    (first,) = cached(pool, cache, [1] * 4)
    (mine,) = pool.allocate(1, 2)
    assert cache.insert(None, [1] * 4, 0, page_id=mine, owner=2) is first
    assert pool.references(first.page_id) == 2
    assert pool.state(mine) is PageState.FREE
    (foreign,) = pool.allocate(1, 3)
    with pytest.raises(AssertionError):
        cache.insert(None, [1] * 4, 0, page_id=foreign, owner=2)


def test_no_more_is_evicted_than_asked_for_or_unused():
    pool = PagePool(8)
    cache = PrefixCache(pool, PAGE)
    cache.release(cached(pool, cache, [1] * 12))
    used = cached(pool, cache, [2] * 4)
    assert cache.evict(0) == 0
    assert cache.evict(-1) == 0
    assert cache.evict(2) == 2
    assert pool.num_unreferenced == 1
    assert cache.evict(9) == 1
    assert cache.evict(1) == 0
    cache.release(used)
    assert cache.evict(9) == 1
    assert pool.num_free == 8
    cache.check_integrity()


def test_a_page_used_by_another_sequence_stays_when_one_gives_it_back():
    pool = PagePool(4)
    cache = PrefixCache(pool, PAGE)
    one, two = cached(pool, cache, [1] * 8), cached(pool, cache, [1] * 8)
    cache.release(one)
    assert cache.evict(9) == 0
    cache.release(two)
    assert cache.evict(9) == 2


def test_what_is_used_again_is_evicted_last():
    pool = PagePool(4)
    cache = PrefixCache(pool, PAGE)
    for token in (1, 2, 3):
        cache.release(cached(pool, cache, [token] * 4))
    cache.release(cache.match([1] * 4, 1))
    for kept in ([3, 1], [1], []):
        assert cache.evict(1) == 1
        survivors = [token for token in (1, 2, 3) if (token,) * 4 in cache._root.children]
        assert sorted(survivors) == sorted(kept)


def test_a_parent_is_evicted_in_the_order_of_its_own_last_use():
    """Its child goes first; then it is as old as its last use, not as its child's end."""
    pool = PagePool(8)
    cache = PrefixCache(pool, PAGE)
    cache.release(cached(pool, cache, [1] * 8))
    cache.release(cached(pool, cache, [2] * 4))
    cache.release(cache.match([1] * 4, 1))
    assert cache.evict(2) == 2
    assert node_of(cache, [1] * 4).children == {}
    assert (2,) * 4 not in cache._root.children


def test_a_node_given_a_child_while_it_waits_to_be_evicted_stays_below_it():
    pool = PagePool(4)
    cache = PrefixCache(pool, PAGE)
    cache.release(cached(pool, cache, [1] * 4))
    nodes = cached(pool, cache, [1] * 8)
    assert cache.evict(9) == 0
    cache.release(nodes[1:])
    assert cache.evict(1) == 1
    cache.check_integrity()
    assert pool.references(nodes[0].page_id) == 1


def test_eviction_keeps_its_order_when_the_books_are_cleaned_of_what_was_used_again():
    pool = PagePool(4)
    cache = PrefixCache(pool, PAGE)
    for token in (1, 2, 3):
        cache.release(cached(pool, cache, [token] * 4))
    for _ in range(50):
        cache.release(cache.match([1] * 4, 1))
        assert len(cache._leaves) <= 2 * pool.num_pages + 1
    for evicted in (2, 3, 1):
        assert (evicted,) * 4 in cache._root.children
        assert cache.evict(1) == 1
        assert (evicted,) * 4 not in cache._root.children


def test_what_was_used_again_is_still_evicted_when_the_books_were_cleaned_of_its_older_use():
    """An eviction in between leaves the newer entry before the older one in the heap's list."""
    pool = PagePool(4)
    cache = PrefixCache(pool, PAGE)
    for token in (1, 2, 3, 3):
        cache.release(cached(pool, cache, [token] * 4))
    assert cache.evict(1) == 1
    for _ in range(2 * pool.num_pages):
        cache.release(cache.match([2] * 4, 1))
    assert len(cache._leaves) < 2 * pool.num_pages, "they were cleaned"
    assert cache.evict(2) == 2


def test_pages_still_in_use_are_not_forgotten():
    pool = PagePool(4)
    cache = PrefixCache(pool, PAGE)
    nodes = cached(pool, cache, [1] * 8)
    cache.match([1] * 4, 1)
    cache.release(nodes)
    cache.forget(nodes)
    assert node_of(cache, [1] * 4).children == {}
    assert pool.num_free == 3
    cache.check_integrity()


def test_a_page_that_hangs_twice_and_one_that_hangs_nowhere_are_noticed():
    pool = PagePool(4)
    cache = PrefixCache(pool, PAGE)
    node, child = cached(pool, cache, [1] * 8)
    cache.check_integrity()
    pool.retain(child.page_id)
    with pytest.raises(AssertionError, match="orphaned reference"):
        cache.check_integrity()
    pool.release(child.page_id)
    cache._root.children[(9,) * 4] = PrefixNode(None, (9,) * 4, node.page_id, 0)
    with pytest.raises(AssertionError, match="hangs twice"):
        cache.check_integrity()
    cache._root.children.clear()
    with pytest.raises(AssertionError, match="not in the tree"):
        cache.check_integrity()


class Oracle:
    """The rule, written plainly: a path is as old as the last sequence that gave it back, and leaves go first."""

    def __init__(self) -> None:
        self.used: dict[tuple[int, ...], int] = {}
        self.clock = 0

    def use(self, path: tuple[int, ...]) -> None:
        self.clock += 1
        self.used |= {path[:length]: self.clock for length in range(1, len(path) + 1)}

    def evict(self, count: int) -> None:
        for _ in range(min(count, len(self.used))):
            del self.used[min(filter(self.is_leaf, self.used), key=self.used.__getitem__)]

    def forget(self, path: tuple[int, ...]) -> None:
        for length in range(len(path), 0, -1):
            if self.is_leaf(path[:length]):
                del self.used[path[:length]]

    def is_leaf(self, path: tuple[int, ...]) -> bool:
        return not any(path == other[:-1] for other in self.used)


_PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("use"), _PATHS),
        st.tuples(st.just("use"), _PATHS),
        st.tuples(st.just("discard"), _PATHS),
        st.tuples(st.just("evict"), st.integers(1, 3)),
    ),
    max_size=200,
)


@given(_OPERATIONS)
def test_eviction_takes_the_longest_unused_leaf_whatever_was_used_or_discarded_before(operations):
    pool = PagePool(6)
    cache = PrefixCache(pool, 1)
    oracle = Oracle()
    for name, operand in operations:
        if name == "evict":
            assert cache.evict(operand) == min(operand, len(oracle.used))
            oracle.evict(operand)
        else:
            nodes, path = _filed(pool, cache, operand)
            cache.release(nodes)
            oracle.use(path)
            if name == "discard":
                cache.forget(nodes)
                oracle.forget(path)
        assert _paths(cache) == set(oracle.used)
        assert len(cache._leaves) <= 2 * pool.num_pages + 1
    cache.check_integrity()


def _filed(pool: PagePool, cache: PrefixCache, path: tuple[int, ...]) -> tuple[list[PrefixNode], tuple[int, ...]]:
    """File pages of one token each, as many as there are pages for; return their nodes, used, and what they hold."""
    nodes = cache.match(path, len(path))
    path = path[: len(nodes) + pool.num_free]
    for index in range(len(nodes), len(path)):
        (page_id,) = pool.allocate(1, 1)
        nodes.append(cache.insert(nodes[-1] if nodes else None, path, index, page_id=page_id, owner=1))
    return nodes, path


def _paths(cache: PrefixCache) -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = set()
    stack = [(node, node.token_ids) for node in cache._root.children.values()]
    while stack:
        node, path = stack.pop()
        found.add(path)
        stack += [(child, path + child.token_ids) for child in node.children.values()]
    return found


def test_others_are_told_once_which_pages_came_and_which_went():
    allocator = PageAllocator(4, PAGE, tells_cache=True)
    fill(allocator, 1, [*range(8), 99])
    first, second = page_hashes(list(range(8)), PAGE)
    assert allocator.take_cache_changes() == [(first, True), (second, True)]
    assert allocator.take_cache_changes() == []
    fill(allocator, 2, [*range(4), 50, 51, 52, 53, 60, 61, 62, 63, 9])  # four pages: the second one gives way
    changes = dict(allocator.take_cache_changes())
    assert changes.pop(second) is False
    assert list(changes) == page_hashes([*range(4), 50, 51, 52, 53, 60, 61, 62, 63], PAGE)[1:]
    assert all(changes.values())


def test_what_came_and_went_unseen_is_no_news():
    allocator = PageAllocator(2, PAGE, tells_cache=True)
    for owner in range(100):
        fill(allocator, owner, [owner] * 8)
    assert allocator.take_cache_changes() == [(page, True) for page in page_hashes([99] * 8, PAGE)]
