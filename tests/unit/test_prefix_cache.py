"""What the prefix cache finds, and what it gives up first."""

import pytest
from headrace_core.errors import OverloadedError
from headrace_core.kv.sequence_pages import PageAllocator

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


def test_a_hot_prefix_does_not_grow_the_books():
    allocator = PageAllocator(4, PAGE)
    for owner in range(1000):
        fill(allocator, owner, [1] * 9)
    assert len(allocator._cache._leaves) <= 2 * 4 + 2
