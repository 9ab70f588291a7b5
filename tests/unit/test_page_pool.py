"""No page is ever lost, held twice, or reused unseen, in whatever order things happen."""

import pytest
from headrace_core.errors import OverloadedError
from headrace_core.kv.page_pool import PagePool, PageState
from headrace_core.kv.sequence_pages import PageAllocator, SequencePages
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

PAGE_SIZE = 2
NUM_PAGES = 9


def test_a_freed_page_has_another_generation():
    pool = PagePool(2)
    (page_id,) = pool.allocate(1, 7)
    before = pool.generation(page_id)
    pool.free([page_id], 7)
    assert pool.generation(page_id) == before + 1


def test_an_evicted_page_has_another_generation():
    pool = PagePool(1)
    pool.allocate(1, 7)
    pool.share(0, 7)
    assert pool.generation(0) == 0
    pool.release(0)
    pool.evict(0)
    assert pool.generation(0) == 1


def test_a_renewed_page_has_another_generation_and_the_same_owner():
    pool = PagePool(2)
    page_ids = pool.allocate(2, 7)
    for generation in (1, 2):
        pool.renew(page_ids[:1], 7)
        assert [pool.generation(page_id) for page_id in page_ids] == [generation, 0]
    with pytest.raises(AssertionError, match="is not 8's"):
        pool.renew(page_ids, 8)
    pool.free(page_ids, 7)
    with pytest.raises(AssertionError, match="is not owned"):
        pool.renew(page_ids, 7)


def test_an_exhausted_pool_says_so_and_gives_nothing():
    pool = PagePool(3)
    pool.allocate(2, 1)
    with pytest.raises(OverloadedError) as raised:
        pool.allocate(2, 2)
    assert raised.value.reason == "NO_FREE_PAGES"
    assert str(raised.value) == "2 pages needed, 1 of 3 free; try again later"
    assert pool.num_free == 1


def test_a_quarantined_page_is_not_given_away():
    pool = PagePool(1)
    pool.quarantine(pool.allocate(1, 1), 1)
    with pytest.raises(OverloadedError):
        pool.allocate(1, 2)
    pool.free([0], 1)
    assert pool.allocate(1, 2) == [0]


@pytest.mark.parametrize("misuse", ["free", "quarantine", "share"])
def test_a_page_of_another_owner_is_not_touched(misuse):
    pool = PagePool(1)
    pool.allocate(1, 1)
    with pytest.raises(AssertionError):
        pool.share(0, 2) if misuse == "share" else getattr(pool, misuse)([0], 2)
    pool.check_integrity()


def test_generations_rise_each_time_a_page_is_given_back():
    pool = PagePool(2)
    for generation in range(1, 4):
        pool.free(pool.allocate(1, 7), 7)
        assert sorted(pool.generation(page_id) for page_id in range(2)) == [0, generation]


def test_a_pool_without_pages_is_no_pool():
    with pytest.raises(AssertionError, match="a pool needs pages"):
        PagePool(0)


def test_all_pages_can_be_had_and_each_once():
    pool = PagePool(3)
    assert sorted(pool.allocate(3, 0)) == [0, 1, 2]
    assert pool.allocate(0, 0) == []
    with pytest.raises(AssertionError, match="owners are not negative"):
        pool.allocate(0, -1)


def test_a_shared_page_is_cached_while_anybody_uses_it_and_after():
    pool = PagePool(2)
    pool.allocate(1, 7)
    pool.share(0, 7)
    pool.retain(0)
    assert (pool.state(0), pool.references(0), pool.num_unreferenced) == (PageState.CACHED, 2, 0)
    pool.release(0)
    with pytest.raises(AssertionError, match="page 0 is in use"):
        pool.evict(0)
    pool.release(0)
    assert (pool.state(0), pool.references(0), pool.num_unreferenced) == (PageState.CACHED, 0, 1)
    pool.retain(0)
    assert (pool.references(0), pool.num_unreferenced) == (1, 0)
    pool.release(0)
    pool.evict(0)
    assert (pool.state(0), pool.num_unreferenced, pool.num_free) == (PageState.FREE, 0, 2)
    pool.check_integrity()


def test_pages_are_counted_by_state():
    pool = PagePool(10)
    pool.allocate(6, 7)
    pool.quarantine([0, 1, 2], 7)
    pool.share(3, 7)
    pool.share(4, 7)
    counts = {PageState.FREE: 4, PageState.OWNED: 1, PageState.CACHED: 2, PageState.QUARANTINED: 3}
    assert pool.counts() == counts
    pool.free([0, 5], 7)
    assert pool.counts() == counts | {PageState.FREE: 6, PageState.OWNED: 0, PageState.QUARANTINED: 2}


@pytest.mark.parametrize(
    ("misuse", "words"),
    [
        (lambda pool: pool.free([9], 7), "page 9 is not owned"),
        (lambda pool: pool.free([2], 7), "page 2 is not owned"),
        (lambda pool: pool.free([1, 1], 7), "page 1 is not owned"),
        (lambda pool: pool.quarantine([2], 7), "page 2 is not owned"),
        (lambda pool: pool.quarantine([0], 7), "page 0 is not owned"),
        (lambda pool: pool.share(0, 7), "page 0 is not owned"),
        (lambda pool: pool.share(2, 7), "page 2 is not owned"),
        (lambda pool: pool.retain(1), "page 1 is not cached"),
        (lambda pool: pool.release(1), "page 1 has no references"),
        (lambda pool: pool.release(3), "page 3 has no references"),
        (lambda pool: pool.evict(1), "page 1 is not cached"),
    ],
)
def test_what_a_pages_state_does_not_allow_is_a_bug_of_ours(misuse, words):
    """Pages: 0 is quarantined, 1 owned, 2 cached and used, 3 cached and unused, the rest free."""
    pool = PagePool(10)
    pool.allocate(4, 7)
    pool.quarantine([0], 7)
    for page_id in (2, 3):
        pool.share(page_id, 7)
    pool.release(3)
    with pytest.raises(AssertionError, match=words):
        misuse(pool)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda pool: pool._free[0].append(pool._free[0][0]), "a page is free twice"),
        (lambda pool: pool._free[0].pop(), "pages are miscounted"),
        (lambda pool: pool._states.__setitem__(1, PageState.FREE), "pages are miscounted"),
        (lambda pool: pool._owners.__setitem__(1, -1), "page 1: owner does not fit"),
        (lambda pool: pool._owners.__setitem__(2, 7), "page 2: owner does not fit"),
        (lambda pool: pool._references.__setitem__(1, 1), "page 1: stray references"),
        (lambda pool: pool._free[0].__setitem__(0, 1), "the free list and the states differ"),
        (lambda pool: pool._references.__setitem__(2, 0), "unreferenced pages are miscounted"),
    ],
)
def test_damaged_books_are_noticed(damage, words):
    """Pages: 1 is owned, 2 cached and used, the others free."""
    pool = PagePool(4)
    pool.allocate(3, 7)
    pool.free([0], 7)
    pool.share(2, 7)
    pool.check_integrity()
    damage(pool)
    with pytest.raises(AssertionError, match=words):
        pool.check_integrity()


class Pages(RuleBasedStateMachine):
    """Sequences that come, grow, share, are quarantined and go. Content is tracked beside, as a cache would hold it."""

    live = Bundle("live")
    num_lanes = 1

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(
            NUM_PAGES * self.num_lanes, PAGE_SIZE, num_lanes=self.num_lanes, tells_cache=True
        )
        self.told: set[int] = set()
        self.next_owner = 0
        # What each page holds: the whole token prefix that its content depends on.
        self.content: dict[int, tuple[int, ...]] = {}
        self.sequences: list[tuple[SequencePages, list[int]]] = []

    @rule(target=live, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10), turn=st.integers(0, 2))
    def match(self, tokens, turn):
        self.next_owner += 1
        pages = self.allocator.match(self.next_owner, tokens, lane=turn % self.num_lanes)
        assert len(pages.page_ids) * PAGE_SIZE < len(tokens), "one token is left to compute"
        for index, page_id in enumerate(pages.page_ids):
            assert self.content[page_id] == tuple(tokens[: (index + 1) * PAGE_SIZE]), "a foreign page was matched"
        entry = (pages, tokens)
        try:
            self.allocator.reserve(pages, len(tokens))
        except OverloadedError:
            self.allocator.free(pages)
        self.sequences.append(entry)
        return entry

    @rule(target=live, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def admit(self, tokens):
        """Into the lane that the allocator chooses; one that has no room in any has no pages."""
        self.next_owner += 1
        needed, had = self.allocator.pages_for(len(tokens)), self.allocator.most_available
        pages = self.allocator.admit(self.next_owner, tokens)
        assert pages or had < needed, "a lane had room"
        entry = (pages or SequencePages(self.next_owner), tokens)
        assert not pages or len(pages.page_ids) == needed
        self.sequences.append(entry)
        return entry

    @rule(entry=live, count=st.integers(0, 10))
    def compute(self, entry, count):
        pages, tokens = entry
        if not pages.page_ids or pages.is_quarantined:
            return
        count = min(count, len(tokens))
        own = set(pages.own_page_ids)
        for index in range(min(self.allocator.pages_for(count), len(pages.page_ids))):
            if pages.page_ids[index] in own:
                self.content[pages.page_ids[index]] = tuple(tokens[: min((index + 1) * PAGE_SIZE, count)])
        self.allocator.commit(pages, tokens, count)

    @rule(entry=live)
    def quarantine(self, entry):
        pages, _ = entry
        if pages.page_ids and not pages.is_quarantined:
            self.allocator.quarantine(pages)

    @rule(entry=consumes(live))
    def free(self, entry):
        self.allocator.free(entry[0])
        self.sequences.remove(entry)

    @rule(entry=consumes(live))
    def discard(self, entry):
        self.allocator.discard(entry[0])
        self.sequences.remove(entry)

    @invariant()
    def conserved(self):
        self.allocator.check_integrity()
        held = [page_id for pages, _ in self.sequences for page_id in pages.own_page_ids]
        assert len(held) == len(set(held)), "two sequences own one page"
        pool = self.allocator.pool
        for pages, _ in self.sequences:
            assert set(pages.page_ids) <= set(pool.lane_range(pages.lane)), "a sequence is in two lanes"
        for page, is_cached in self.allocator.take_cache_changes():
            (self.told.add if is_cached else self.told.remove)(page)
        cached = [page_id for page_id in range(pool.num_pages) if pool.state(page_id) is PageState.CACHED]
        assert len(self.told) == len({self.content[page_id] for page_id in cached}), "others are told something else"
        counts = pool.counts()
        assert len(held) == counts[PageState.OWNED] + counts[PageState.QUARANTINED]

    def teardown(self):
        for pages, _ in self.sequences:
            self.allocator.free(pages)
        self.allocator.check_integrity()
        assert self.allocator.num_available == NUM_PAGES * self.num_lanes
        assert self.allocator._num_holders == [0] * self.num_lanes


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class PagesOfLanes(Pages):
    """The same in three lanes."""

    num_lanes = 3


TestPagesOfLanes = PagesOfLanes.TestCase
TestPagesOfLanes.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
