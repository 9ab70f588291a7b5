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


def test_an_exhausted_pool_says_so_and_gives_nothing():
    pool = PagePool(3)
    pool.allocate(2, 1)
    with pytest.raises(OverloadedError) as raised:
        pool.allocate(2, 2)
    assert raised.value.reason == "NO_FREE_PAGES"
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


class Pages(RuleBasedStateMachine):
    """Sequences that come, grow, share, are quarantined and go. Content is tracked beside, as a cache would hold it."""

    live = Bundle("live")

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES, PAGE_SIZE)
        self.next_owner = 0
        # What each page holds: the whole token prefix that its content depends on.
        self.content: dict[int, tuple[int, ...]] = {}
        self.sequences: list[tuple[SequencePages, list[int]]] = []

    @rule(target=live, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def admit(self, tokens):
        self.next_owner += 1
        pages = self.allocator.match(self.next_owner, tokens)
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
        if pages.page_ids and not pages.nodes and not pages.is_quarantined:
            self.allocator.quarantine(pages)

    @rule(entry=consumes(live))
    def free(self, entry):
        self.allocator.free(entry[0])
        self.sequences.remove(entry)

    @invariant()
    def conserved(self):
        self.allocator.check_integrity()
        held = [page_id for pages, _ in self.sequences for page_id in pages.own_page_ids]
        assert len(held) == len(set(held)), "two sequences own one page"
        counts = self.allocator.pool.counts()
        assert len(held) == counts[PageState.OWNED] + counts[PageState.QUARANTINED]

    def teardown(self):
        for pages, _ in self.sequences:
            self.allocator.free(pages)
        self.allocator.check_integrity()
        assert self.allocator.num_available == NUM_PAGES


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
