"""One worker over one connection: who it is, its load, and what the router has promised of it.

Free pages are the last report's, less every reservation as far as the report can't know it: all of it until the
sequence has started there, then its expected growth. The same goes for prompt tokens in flight and sequence slots:
what other routers use is in the report, what this one uses it knows itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Protocol

from headrace.v1 import worker_service_pb2
from headrace.v1.types_pb2 import WORKER_ROLE_BOTH, WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL
from headrace_core.errors import HeadraceError
from headrace_core.kv.layout import KvLayout

from headrace_router.fleet.answers import ROLE_NAMES
from headrace_router.fleet.session import LastTransfer, StepSession
from headrace_router.placement.breaker import Breaker, Circuit
from headrace_router.placement.capacity import Waiting, WorkerView
from headrace_router.placement.fair_queue import Client
from headrace_router.placement.policy import decode_pages, prefill_pages

_BUDGET_STEPS = 2
"""Steps of prompt tokens that a worker may have in flight: one computing, one waiting."""


class TokenCount(Protocol):
    """A sequence, as a reservation sees it."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        ...


@dataclass(slots=True, eq=False)
class Reservation:
    """What one sequence may use of one worker."""

    owner: TokenCount
    client: Client
    """Whose output it generates here; empty: nobody's."""
    num_pages: int
    num_unseen_pages: int
    """The part that the last load report does not show."""
    num_prefill_tokens: int
    """Prompt tokens in flight; 0 once they are computed. `Worker.on_prefilled` changes it."""
    is_started: bool = False
    """True when the worker has allocated the sequence's pages."""


class Worker:
    """One incarnation of a worker, connected. Event loop only."""

    def __init__(
        self,
        address: str,
        info: worker_service_pb2.GetInfoResponse,
        layout: KvLayout,
        router_id: int,
        breaker: Breaker | None = None,
    ) -> None:
        """Take who it is.

        Args:
            address: its own.
            info: checked.
            layout: what it says of its pages, as a value.
            router_id: this router's.
            breaker: of its address; None: a new one.
        """
        self.breaker = breaker or Breaker()
        self.address = address
        self.info = info
        self.layout = layout
        self.session = StepSession(router_id, info, layout)
        self.can_decode = info.role in (WORKER_ROLE_DECODE, WORKER_ROLE_BOTH)
        self.can_prefill = info.role in (WORKER_ROLE_PREFILL, WORKER_ROLE_BOTH)
        self.reported = asyncio.Event()
        self.lost: asyncio.Future[HeadraceError] = asyncio.get_running_loop().create_future()
        """Why its connection is gone; pending while it is not."""
        self.load = worker_service_pb2.WatchLoadResponse()
        self.last_transfer: LastTransfer | None = None
        """Its last hand-off; None if there was none."""
        self.role_name = ROLE_NAMES.get(info.role, "unknown")
        self.is_blamed_for_loss = False
        """True once its loss was counted as a failure: it is one, however many sequences it had."""
        self.cached: set[int] = set()
        """Pages in its prefix cache, by their hashes (`kv/page_hash`), as it last said."""
        self._reservations: set[Reservation] = set()
        self._num_unseen = self._own_tokens = 0
        """Of all reservations together: pages that the last report does not show, prompt tokens in flight."""
        self._held: dict[Client, int] = {}
        """Reservations by client, and by its address."""
        self._holders: frozenset[Client] | None = frozenset()
        """Of `_held`, the keys; None while they are to be taken again."""
        self._is_held = False
        self._num_usable_pages = 0
        # As the worker's scheduler: a step has a token at least for every sequence.
        self._num_slots = min(info.max_step_sequences, info.max_step_tokens)
        self._num_foreign_tokens = 0
        self._num_foreign_sequences = 0

    @property
    def is_busy(self) -> bool:
        """True while a sequence of this router uses the worker."""
        return bool(self._reservations)

    @property
    def takes_work(self) -> bool:
        """True unless it refused work since its last report."""
        return not self._is_held

    def on_report(self, load: worker_service_pb2.WatchLoadResponse) -> None:
        """Take a load report."""
        self.load = load
        self._is_held = False
        self._take_cache(load)
        self._num_usable_pages = max(self._num_usable_pages, load.num_free_pages)
        num_unseen = 0
        for reservation in self._reservations:
            if reservation.is_started:
                num_seen = -(-reservation.owner.num_tokens // self.layout.page_size)
                reservation.num_unseen_pages = max(0, reservation.num_pages - num_seen)
            num_unseen += reservation.num_unseen_pages
        self._num_unseen = num_unseen
        self._num_foreign_tokens = max(0, load.num_waiting_tokens - self._own_tokens)
        self._num_foreign_sequences = max(0, load.num_running + load.num_waiting - len(self._reservations))
        self.reported.set()

    def _take_cache(self, load: worker_service_pb2.WatchLoadResponse) -> None:
        if load.is_cache_whole or len(self.cached) > 2 * self.info.num_pages:  # more than there can be: a hint no more
            self.cached.clear()
        if load.pages_evicted:
            self.cached.difference_update(load.pages_evicted)
        if load.pages_cached:
            self.cached.update(load.pages_cached)

    def hold(self) -> None:
        """Give it nothing more until its next load report: what the router knows of it is wrong."""
        self._is_held = True

    def reserve(self, owner: TokenCount, waiting: Waiting, *, prefills: bool, decodes: bool) -> Reservation:
        """Set aside what a sequence needs here until `release`."""
        view = self.view()
        num_pages = decode_pages(waiting, view) if decodes else prefill_pages(waiting, view)
        num_tokens = waiting.num_new_tokens if prefills else 0
        client = waiting.client if decodes else ()
        reservation = Reservation(owner, client, num_pages, num_pages, num_tokens)
        self._reservations.add(reservation)
        self._num_unseen += num_pages
        self._own_tokens += num_tokens
        self.breaker.on_start(reservation, time.monotonic())
        for path in _paths(client):
            self._held[path] = self._held.get(path, 0) + 1
            if self._held[path] == 1:
                self._holders = None
        return reservation

    def on_prefilled(self, reservation: Reservation) -> None:
        """The sequence runs here, or its pages are held here: nothing of its prompt is left to compute."""
        if reservation in self._reservations:
            self._own_tokens -= reservation.num_prefill_tokens
        reservation.num_prefill_tokens, reservation.is_started = 0, True

    def release(self, reservation: Reservation) -> None:
        """Give a reservation back; idempotent."""
        if reservation in self._reservations:
            self._reservations.remove(reservation)
            self._num_unseen -= reservation.num_unseen_pages
            self._own_tokens -= reservation.num_prefill_tokens
            self.breaker.on_over(reservation)
            for path in _paths(reservation.client):
                self._held[path] -= 1
                if not self._held[path]:
                    del self._held[path]
                    self._holders = None

    def view(self) -> WorkerView:
        """Return what policies need to know."""
        info = self.info
        is_probed = self.breaker.circuit(time.monotonic()) is Circuit.HALF_OPEN
        num_free_slots = self._num_slots - len(self._reservations) - self._num_foreign_sequences
        if self._holders is None:
            self._holders = frozenset(self._held)
        return WorkerView(
            address=self.address,
            page_size=self.layout.page_size,
            num_pages=info.num_pages,
            num_usable_pages=self._num_usable_pages,
            num_free_pages=self.load.num_free_pages - self._num_unseen,
            num_lanes=info.num_lanes or 1,
            most_free_pages=self.load.most_free_pages or self.load.num_free_pages,
            token_budget=0 if is_probed else _BUDGET_STEPS * info.max_step_tokens,  # of an idle one: a prompt
            num_tokens_in_flight=self._own_tokens + self._num_foreign_tokens,
            num_free_slots=min(num_free_slots, 1) if is_probed else num_free_slots,
            can_prefill=self.can_prefill,
            can_decode=self.can_decode,
            max_context_tokens=info.max_context_tokens,
            num_slots=self._num_slots,
            holders=self._holders,
            step_s=self.session.step_s if self.load.num_running else 0.0,
            cached=self.cached,
        )

    def on_lost(self, error: HeadraceError) -> None:
        """The connection is gone: fail what runs here."""
        self._is_held = True
        self.session.fail(error)
        if not self.lost.done():
            self.lost.set_result(error)


def _paths(client: Client) -> list[Client]:
    """Return a client and the address that it calls from."""
    return list({client, client[:1]}) if client else []
