"""What both schedulers keep besides their policies: the pages, the planned step, what happened since the last look.

A scheduler is composed of one. No torch, no grpc, no clock; engine thread only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from headrace_core.batch.scheduler import Load
from headrace_core.batch.step import ForwardPlan, SamplingRow, StepPlan
from headrace_core.errors import HeadraceError, OverloadedError
from headrace_core.kv.page_pool import PageState
from headrace_core.kv.sequence_pages import PageAllocator, SequencePages


@dataclass(frozen=True, slots=True)
class Failed:
    """A sequence can't go on; its pages are free."""

    key: int
    error: HeadraceError


E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class FetchReady:
    """A sequence has its pages; have those of its beginning that another worker has cached brought into `page_ids`.

    The first of them are the prefix cache's, which have `num_have_tokens` already and are not to be written to.
    """

    key: int
    page_ids: tuple[int, ...]
    num_have_tokens: int


class StepBook(Generic[E]):
    """`E`: the events of its scheduler, `Failed` among them."""

    def __init__(self, pages: PageAllocator, *, max_waiting_sequences: int) -> None:
        self.pages = pages
        self._max_waiting = max_waiting_sequences
        self._planned: deque[StepPlan] = deque()
        """Steps under way, the oldest first."""
        self._held: list[tuple[StepPlan, SequencePages, bool]] = []
        """Pages to be given back when the step is applied that names them; whether to discard them."""
        self._events: list[E | Failed] = []

    def tell(self, event: E | Failed) -> None:
        """Add an event."""
        self._events.append(event)

    def take_events(self) -> Sequence[E | Failed]:
        """Return what happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def admits(self, key: int, *, num_tokens: int, num_waiting: int) -> bool:
        """Return whether a sequence that takes pages for `num_tokens` may queue behind `num_waiting` others.

        If it may not, a `Failed` event tells why: NO_FREE_PAGES, QUEUE_FULL.
        """
        if self.pages.pages_for(num_tokens) > self.pages.lane_pages:
            self.tell(Failed(key, self.too_large(num_tokens)))
        elif num_waiting >= self._max_waiting:
            text = f"{num_waiting} sequences wait already; try again later"
            self.tell(Failed(key, OverloadedError("QUEUE_FULL", text)))
        else:
            return True
        return False

    def too_large(self, num_tokens: int) -> OverloadedError:
        """Return the error of a sequence that takes more pages than it could ever have."""
        pages = self.pages
        most = f"each of {pages.num_lanes} lanes" if pages.num_lanes > 1 else "the whole pool"
        needed = f"{num_tokens} tokens take {pages.pages_for(num_tokens)} pages"
        return OverloadedError("NO_FREE_PAGES", f"{needed}, {most} has {pages.lane_pages}; raise --kv-pool-mib")

    @property
    def planned(self) -> StepPlan:
        """The step under way, of several the oldest."""
        assert self._planned, "no step is planned"
        return self._planned[0]

    @property
    def is_spoilt(self) -> bool:
        """Whether pages that hold nonsense wait for a step: until then somebody might find them."""
        return any(is_discarded for _, _, is_discarded in self._held)

    def is_under_way(self, key: int) -> bool:
        """Return whether a step under way has a row of the sequence."""
        return self._naming(key) is not None

    def give_back(self, key: int, pages: SequencePages, *, is_discarded: bool = False) -> None:
        """Give a sequence's pages back, or discard them: now, or when the steps under way that name them are over."""
        plan = self._naming(key)
        if plan is not None:
            # What it had is another's now: of the sequence itself nothing is left to be seen.
            held = replace(pages)
            pages.page_ids, pages.nodes = [], []
            self._held.append((plan, held, is_discarded))
        elif is_discarded:
            self.pages.discard(pages)
        else:
            self.pages.free(pages)

    def _naming(self, key: int) -> StepPlan | None:
        """Return the last step under way that names the sequence's pages."""
        return next((p for p in reversed(self._planned) if any(chunk.key == key for chunk in p.chunks)), None)

    def plan(self, forward: ForwardPlan, sampling: dict[int, SamplingRow]) -> StepPlan | None:
        """Return the step in place of those under way, and remember it until `take_planned`; None: it has no chunks."""
        self._planned.clear()
        return self.plan_ahead(forward, sampling)

    def plan_ahead(self, forward: ForwardPlan, sampling: dict[int, SamplingRow]) -> StepPlan | None:
        """Return the step after those under way, and remember it; None: it has no chunks."""
        if not forward.chunks:
            return None
        self._planned.append(StepPlan(forward, sampling))
        return self._planned[-1]

    def take_planned(self) -> StepPlan:
        """Return the oldest step under way, once: it was computed, or failed. What was held for it is given back."""
        plan = self.planned
        self._planned.popleft()
        for naming, pages, is_discarded in self._held:
            if naming is plan:
                (self.pages.discard if is_discarded else self.pages.free)(pages)
        self._held = [held for held in self._held if held[0] is not plan]
        return plan

    def load(self, *, num_running: int, num_waiting: int, num_waiting_tokens: int, num_sequences: int) -> Load:
        """Return what is held now, the pages counted, and once what changed in the prefix cache."""
        return Load(
            num_free_pages=self.pages.num_available,
            most_free_pages=self.pages.most_available,
            num_running=num_running,
            num_waiting=num_waiting,
            num_waiting_tokens=num_waiting_tokens,
            num_sequences=num_sequences,
            page_counts=self.pages.pool.counts(),
            cache_changes=tuple(self.pages.take_cache_changes()),
        )

    def check_integrity(self, held: Iterable[SequencePages]) -> None:
        """Assert that no page is lost or held twice, and that `held` are all that sequences have and refer to."""
        self.pages.check_integrity()
        pool, num_owned, num_shared = self.pages.pool, 0, 0
        for pages in (*held, *(pages for _, pages, _ in self._held)):
            num_owned += len(pages.own_page_ids)
            num_shared += len(pages.nodes)
        counts = pool.counts()
        assert num_owned == counts[PageState.OWNED] + counts[PageState.QUARANTINED], "pages without a sequence"
        num_references = sum(pool.references(page_id) for page_id in range(pool.num_pages))
        assert num_shared == num_references, "references without a sequence"
