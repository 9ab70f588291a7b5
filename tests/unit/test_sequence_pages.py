"""What a sequence holds: pages for its tokens, taken all or none, shared where equal, given back once."""

import pytest
from headrace_core.errors import OverloadedError
from headrace_core.kv.page_pool import PageState
from headrace_core.kv.sequence_pages import PageAllocator, SequencePages

PAGE = 4


def computed(allocator: PageAllocator, owner: int, tokens: list[int]) -> SequencePages:
    """Return the pages of a sequence that is computed and goes on."""
    pages = allocator.match(owner, tokens)
    allocator.reserve(pages, len(tokens))
    allocator.commit(pages, tokens, len(tokens))
    return pages


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_pages_for_tokens_round_up(num_tokens, num_pages):
    allocator = PageAllocator(8, PAGE)
    assert allocator.pages_for(num_tokens) == num_pages
    pages = allocator.match(1, [])
    allocator.reserve(pages, num_tokens)
    assert len(pages.page_ids) == num_pages


def test_a_sequence_grows_by_what_it_lacks_and_keeps_what_it_has():
    allocator = PageAllocator(8, PAGE)
    pages = SequencePages(1)
    allocator.reserve(pages, 5)
    first = list(pages.page_ids)
    allocator.reserve(pages, 8)
    assert pages.page_ids == first
    allocator.reserve(pages, 3)
    assert pages.page_ids == first
    allocator.reserve(pages, 9)
    assert pages.page_ids[:2] == first
    assert len(set(pages.page_ids)) == 3
    assert allocator.num_available == 5


def test_a_sequence_gets_all_the_pages_it_needs_or_none():
    allocator = PageAllocator(4, PAGE)
    held = SequencePages(1)
    allocator.reserve(held, 8)
    pages = SequencePages(2)
    allocator.reserve(pages, 4)
    with pytest.raises(OverloadedError, match="2 pages needed, 1 of 4 available") as raised:
        allocator.reserve(pages, 12)
    assert raised.value.reason == "NO_FREE_PAGES"
    assert len(pages.page_ids) == 1
    assert allocator.num_available == 1
    allocator.reserve(pages, 8)
    assert allocator.num_available == 0


def test_no_more_cached_pages_are_evicted_than_are_needed():
    allocator = PageAllocator(4, PAGE)
    allocator.free(computed(allocator, 1, [1] * 4))
    allocator.free(computed(allocator, 2, [2] * 4))
    allocator.reserve(SequencePages(3), 3 * PAGE)
    assert len(allocator.match(4, [1] * 5).page_ids) == 0
    assert len(allocator.match(5, [2] * 5).page_ids) == 1


def test_nothing_is_evicted_while_pages_are_free():
    allocator = PageAllocator(4, PAGE)
    allocator.free(computed(allocator, 1, [1] * 8))
    allocator.reserve(SequencePages(2), 2 * PAGE)
    assert len(allocator.match(3, [1] * 9).page_ids) == 2


def test_pages_that_can_be_evicted_are_available():
    allocator = PageAllocator(4, PAGE)
    pages = computed(allocator, 1, [1] * 8)
    assert allocator.num_available == 2
    allocator.free(pages)
    assert allocator.num_available == 4
    allocator.reserve(SequencePages(2), 4 * PAGE)
    assert allocator.num_available == 0
    allocator.check_integrity()


def test_only_full_pages_of_computed_tokens_are_shared():
    allocator = PageAllocator(8, PAGE)
    tokens = list(range(12))
    pages = SequencePages(1)
    allocator.reserve(pages, 12)
    allocator.commit(pages, tokens, 7)
    assert pages.own_page_ids == pages.page_ids[1:]
    assert allocator.match(2, tokens).page_ids == pages.page_ids[:1]
    allocator.commit(pages, tokens, 8)
    assert pages.own_page_ids == pages.page_ids[2:]
    assert allocator.match(3, [*tokens, 99]).page_ids == pages.page_ids[:2]
    allocator.commit(pages, tokens, 8)
    assert pages.own_page_ids == pages.page_ids[2:]


def test_a_page_computed_twice_gives_way_to_the_one_cached_first_and_so_do_its_children():
    allocator = PageAllocator(8, PAGE)
    tokens = [1] * 4 + [2] * 4
    one, two = SequencePages(1), SequencePages(2)
    for pages in (one, two):
        allocator.reserve(pages, 8)
    allocator.commit(one, tokens, 4)
    replaced = list(two.page_ids)
    allocator.commit(two, tokens, 8)
    assert two.page_ids == [one.page_ids[0], replaced[1]]
    assert allocator.pool.state(replaced[0]) is PageState.FREE
    allocator.commit(one, tokens, 8)
    assert one.page_ids == two.page_ids
    for pages in (one, two):
        allocator.free(pages)
    allocator.check_integrity()


def test_pages_under_transfer_are_set_aside_until_freed():
    allocator = PageAllocator(4, PAGE)
    pages = SequencePages(1)
    allocator.reserve(pages, 8)
    assert not pages.is_quarantined
    allocator.quarantine(pages)
    assert pages.is_quarantined
    assert allocator.pool.counts()[PageState.QUARANTINED] == 2
    assert allocator.num_available == 2
    allocator.free(pages)
    assert allocator.num_available == 4
    allocator.check_integrity()


def test_shared_pages_are_never_set_aside_and_are_kept_as_long_as_the_others_are():
    allocator = PageAllocator(4, PAGE)
    allocator.free(computed(allocator, 1, [1] * 8))
    pages = allocator.match(2, [1] * 9)
    allocator.reserve(pages, 12)
    allocator.quarantine(pages)
    counts = allocator.pool.counts()
    assert (counts[PageState.QUARANTINED], counts[PageState.CACHED]) == (1, 2)
    with pytest.raises(OverloadedError):
        allocator.reserve(SequencePages(3), 2 * PAGE)
    allocator.free(pages)
    assert allocator.num_available == 4
    allocator.check_integrity()


def test_all_full_pages_are_found_where_nothing_is_left_to_compute():
    allocator = PageAllocator(4, PAGE)
    allocator.free(computed(allocator, 1, [1] * 8))
    for tokens, num_found in (([1] * 7, 1), ([1] * 8, 2), ([1] * 9, 2)):
        pages = allocator.match(2, tokens, num_left=0)
        assert len(pages.page_ids) == num_found
        allocator.free(pages)
    assert len(allocator.match(2, [1] * 8).page_ids) == 1


def test_a_freed_sequence_holds_nothing_and_may_be_freed_again():
    allocator = PageAllocator(4, PAGE)
    pages = computed(allocator, 1, [1] * 6)
    allocator.free(pages)
    assert (pages.page_ids, pages.nodes, pages.own_page_ids) == ([], [], [])
    allocator.free(pages)
    allocator.check_integrity()
    assert allocator.num_available == allocator.num_pages == 4


def refuse(allocator: PageAllocator, tokens: list[int]) -> None:
    """Find what there is of a sequence in the cache, and give it back for want of pages."""
    allocator.refuse(allocator.match(9, tokens), tokens)


@pytest.mark.parametrize("length", [1, PAGE, PAGE + 1], ids=["an own page", "a shared page", "one of each"])
def test_a_refused_sequence_is_looked_for_again_once_a_page_is_given_back(length):
    allocator = PageAllocator(8, PAGE)
    early, late = computed(allocator, 1, [1] * length), computed(allocator, 2, [2] * length)
    allocator.free(early)
    tokens = [3] * 9
    refuse(allocator, tokens)
    assert allocator.is_refused(tokens)
    allocator.free(late)
    assert not allocator.is_refused(tokens)


def test_the_very_list_that_was_refused_last_is_known_to_be_and_no_other():
    allocator = PageAllocator(8, PAGE)
    tokens, others = [1] * 9, [2] * 9
    assert not allocator.is_refused(tokens)
    refuse(allocator, tokens)
    assert allocator.is_refused(tokens)
    assert not allocator.is_refused(list(tokens))
    refuse(allocator, others)
    assert not allocator.is_refused(tokens)
    assert allocator.is_refused(others)


def test_a_refused_sequence_is_looked_for_again_when_more_of_it_is_cached_and_of_use():
    """The last of three pages is of no use: one token is always left to compute."""
    allocator = PageAllocator(8, PAGE)
    tokens = list(range(12))
    pages = SequencePages(1)
    allocator.reserve(pages, 12)
    for num_computed, is_of_use in ((4, True), (8, True), (12, False)):
        refuse(allocator, tokens)
        assert allocator.is_refused(tokens)
        allocator.commit(pages, tokens, num_computed)
        assert allocator.is_refused(tokens) == (not is_of_use)


def test_a_refused_sequence_is_looked_for_again_when_what_it_found_is_evicted():
    allocator = PageAllocator(4, PAGE)
    allocator.free(computed(allocator, 1, [1] * 4))
    tokens = [1] * 20
    refuse(allocator, tokens)
    assert allocator.is_refused(tokens)
    allocator.reserve(SequencePages(2), 4 * PAGE)
    assert not allocator.is_refused(tokens)


def test_a_lost_page_and_a_lost_reference_are_noticed():
    allocator = PageAllocator(4, PAGE)
    pages = computed(allocator, 1, [1] * 8)
    allocator.check_integrity()
    allocator.pool.release(pages.page_ids[0])
    with pytest.raises(AssertionError, match="orphaned reference"):
        allocator.check_integrity()
    allocator = PageAllocator(4, PAGE)
    allocator.pool.allocate(1, 1)
    allocator.pool.share(0, 1)
    with pytest.raises(AssertionError, match="not in the tree"):
        allocator.check_integrity()


def test_pages_that_somebody_was_told_of_stay_where_an_equal_one_is_cached():
    """Equal by all tokens before them too: another beginning, or another page of it, is no equal one."""
    allocator = PageAllocator(12, PAGE)
    tokens = [1] * 4 + [2] * 4 + [3] * 4
    computed(allocator, 1, tokens[:8])
    pages = SequencePages(2)
    allocator.reserve(pages, 12)
    told = list(pages.page_ids)
    allocator.commit(pages, tokens, 12, keeps_ids=True)
    assert (pages.page_ids, pages.nodes) == (told, [])
    other = SequencePages(3)
    allocator.reserve(other, 12)
    told = list(other.page_ids)
    allocator.commit(other, [*tokens[4:8], *tokens[:8]], 12, keeps_ids=True)
    assert (other.page_ids, len(other.nodes)) == (told, 3)
    after = allocator.match(4, tokens[:5])
    allocator.reserve(after, 12)
    told = list(after.page_ids)
    allocator.commit(after, [*tokens[:4], *tokens[8:], *tokens[4:8]], 12, keeps_ids=True)
    assert (after.page_ids, len(after.nodes)) == (told, 3)
    allocator.check_integrity()


def test_without_that_an_equal_page_takes_the_place():
    allocator = PageAllocator(12, PAGE)
    first = computed(allocator, 1, [1] * 8)
    pages = SequencePages(2)
    allocator.reserve(pages, 8)
    allocator.commit(pages, [1] * 8, 8)
    assert pages.page_ids == first.page_ids


def test_of_a_refused_sequence_one_token_is_left_to_compute_and_no_more():
    allocator = PageAllocator(8, PAGE)
    held = computed(allocator, 1, [1] * 4)
    tokens = [1] * 9
    refuse(allocator, tokens)
    assert allocator.is_refused(tokens)
    allocator.reserve(held, 8)
    allocator.commit(held, [1] * 8, 8)
    assert not allocator.is_refused(tokens), "of its nine tokens eight are there now, and not four"
