"""What both schedulers keep besides their policies: the pages, the planned step, what happened since the last look.

A scheduler is composed of one. No torch, no grpc, no clock; engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
        self._planned: StepPlan | None = None
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
        needed = self.pages.pages_for(num_tokens)
        if needed > self.pages.num_pages:
            text = (
                f"{num_tokens} tokens take {needed} pages, the whole pool has {self.pages.num_pages}; "
                "raise --kv-pool-mib"
            )
            self.tell(Failed(key, OverloadedError("NO_FREE_PAGES", text)))
        elif num_waiting >= self._max_waiting:
            text = f"{num_waiting} sequences wait already; try again later"
            self.tell(Failed(key, OverloadedError("QUEUE_FULL", text)))
        else:
            return True
        return False

    @property
    def planned(self) -> StepPlan:
        """The step under way."""
        assert self._planned is not None, "no step is planned"
        return self._planned

    def plan(self, forward: ForwardPlan, sampling: dict[int, SamplingRow]) -> StepPlan | None:
        """Return the step and remember it until `take_planned`; None if it has no chunks."""
        self._planned = StepPlan(forward, sampling) if forward.chunks else None
        return self._planned

    def take_planned(self) -> StepPlan:
        """Return the step that was planned, once: it was computed, or failed."""
        plan, self._planned = self.planned, None
        return plan

    def load(self, *, num_running: int, num_waiting: int, num_waiting_tokens: int, num_sequences: int) -> Load:
        """Return what is held now, the pages counted."""
        return Load(
            num_free_pages=self.pages.num_available,
            num_running=num_running,
            num_waiting=num_waiting,
            num_waiting_tokens=num_waiting_tokens,
            num_sequences=num_sequences,
            page_counts=self.pages.pool.counts(),
        )

    def check_integrity(self, held: Iterable[SequencePages]) -> None:
        """Assert that no page is lost or held twice, and that `held` are all that sequences have and refer to."""
        self.pages.check_integrity()
        pool, num_owned, num_shared = self.pages.pool, 0, 0
        for pages in held:
            num_owned += len(pages.own_page_ids)
            num_shared += len(pages.nodes)
        counts = pool.counts()
        assert num_owned == counts[PageState.OWNED] + counts[PageState.QUARANTINED], "pages without a sequence"
        num_references = sum(pool.references(page_id) for page_id in range(pool.num_pages))
        assert num_shared == num_references, "references without a sequence"
