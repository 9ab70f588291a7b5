"""Leases: who may still read a sequence's pages, and the one place where holding them ends. Event loop only.

    QUEUED ──pages──► OPEN ──first token──► SEALED ──confirmed──► TAKEN ───┐
       │                └────── it ends the sequence ─────────────────────┼──► FREED
       └──────────────────┴── the call ended, failed, higher attempt ──► ABORTED ──┘

A lease is one Hold call: it begins and ends with it, so there is nothing to renew, to release or to run out. It spans
the sequence's whole life here, so that abort and fencing work in every phase. Pages are sealed run by run as they are
computed; what is sealed may be read. `_end` is the only way out; it hands the sequence's pages back, once. The picture
is the table `states.LEASE_MOVES`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace_core.errors import (
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    PermissionDeniedError,
    TransferCorruptError,
)
from headrace_core.transfer.states import LEASE_MOVES, LeaseEvent, LeaseState
from headrace_core.transfer.transport import Reading
from headrace_core.transfer.values import Order, Owner, Run, replaced, stale_attempt


@dataclass(slots=True, eq=False)
class Lease:
    """One sequence's. `key` names it in the scheduler, `lease_key` where bytes are asked for."""

    key: int
    lease_key: str
    order: Order
    state: LeaseState = LeaseState.QUEUED
    outcome: LeaseState | None = None
    error: HeadraceError | None = None
    """Why it was aborted."""
    runs: list[Run] = field(default_factory=list[Run])
    """What is sealed."""

    @property
    def is_over(self) -> bool:
        """Whether it ended; its pages are free, or as good as."""
        return self.outcome is not None

    def move(self, event: LeaseEvent) -> None:
        """Let `event` happen, of which the table knows."""
        state = LEASE_MOVES.get((self.state, event))
        assert state is not None, f"a lease that is {self.state.value} knows no {event.value}"
        self.state = state


class LeaseTable:
    """Every lease of one process; implements `LeaseHolder`."""

    def __init__(
        self,
        *,
        incarnation: int,
        generation: Callable[[int], int],
        on_end: Callable[[Lease], None],
        on_change: Callable[[], None],
    ) -> None:
        """Args: `generation` tells a page's now; `on_end` frees the pages, called once a lease with `outcome` set."""
        self._incarnation = incarnation
        self._generation = generation
        self._on_end = on_end
        self._on_change = on_change
        self._by_key: dict[str, Lease] = {}
        self._by_owner: dict[Owner, Lease] = {}
        self._num_created = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_held(self) -> int:
        """Leases whose pages wait for a taker: all is computed."""
        return sum(lease.state is LeaseState.SEALED for lease in self._by_key.values())

    @property
    def leases(self) -> Sequence[Lease]:
        """Those not yet freed."""
        return list(self._by_key.values())

    def create(self, order: Order) -> Lease:
        """Return a new lease; one of a lower attempt at the same sequence is aborted.

        Raises:
            HandoffLostError: STALE_ATTEMPT, this or a higher attempt is here already.
        """
        current = self._by_owner.get(order.owner)
        if current and current.order.spec.attempt >= order.spec.attempt:
            raise stale_attempt(order.spec.attempt, current.order.spec.attempt)
        if current:
            self.abort(current, replaced(order.spec.attempt))
        self._num_created += 1
        lease = Lease(self._num_created, secrets.token_hex(16), order)
        self._by_key[lease.lease_key] = self._by_owner[order.owner] = lease
        self._idle.clear()
        return lease

    def admit(self, lease: Lease) -> None:
        """Take note that the sequence has its pages."""
        lease.move(LeaseEvent.ADMIT)

    def seal(self, lease: Lease, run: Run) -> None:
        """Let the taker read these pages: nothing writes them any more until the lease ends."""
        lease.move(LeaseEvent.SEAL)
        lease.runs.append(run)

    def complete(self, lease: Lease) -> None:
        """Take note that everything is computed."""
        lease.move(LeaseEvent.COMPLETE)
        self._on_change()

    def confirm(self, lease: Lease) -> None:
        """End a lease whose taker has everything, unless a page was not the sequence's any more while it was read.

        Raises:
            InvalidRequestError: BAD_REQUEST, there is nothing to confirm yet.
            HandoffLostError: STALE_PAGE.
        """
        if lease.state is not LeaseState.SEALED:
            raise InvalidRequestError(
                "BAD_REQUEST", f"there is nothing to confirm while the lease is {lease.state.value}"
            )
        for run in lease.runs:
            self._check_generations(run)
        self.take(lease)

    def take(self, lease: Lease) -> None:
        """End a lease that fulfilled its purpose. Idempotent."""
        self._end(lease, LeaseEvent.TAKE)

    def abort(self, lease: Lease, error: HeadraceError) -> None:
        """End a lease whose sequence is not wanted any more; whoever waits for it gets `error`. Idempotent."""
        self._end(lease, LeaseEvent.ABORT, error)

    def held_pages(
        self, reading: Reading, *, first_layer: int, num_layers: int, first_page: int, num_pages: int
    ) -> Sequence[int]:
        """See `LeaseHolder`."""
        if reading.incarnation != self._incarnation:
            raise HandoffLostError("WORKER_RESTARTED", "the lease is of an earlier process at this address")
        lease = self._by_key.get(reading.lease_key)
        if lease is None:
            raise HandoffLostError("LEASE_ENDED", "the pages are not held: their Hold call ended")
        if reading.taker != lease.order.taker:
            raise PermissionDeniedError("WRONG_TAKER", "the lease is another worker's; only who opened it may read")
        if reading.tokens_sha256 != lease.order.tokens_sha256:
            raise TransferCorruptError("TOKENS_MISMATCH", "the pages hold other tokens than the taker's; prefill again")
        for run in lease.runs:
            if run.covers(first_layer=first_layer, num_layers=num_layers, first_page=first_page, num_pages=num_pages):
                self._check_generations(run)
                start = first_page - run.first_page
                return run.page_ids[start : start + num_pages]
        raise InvalidRequestError("BAD_HANDOFF", "pages were asked for that are in no sealed run")

    async def wait_idle(self) -> None:
        """Return when no lease is left."""
        await self._idle.wait()

    def _check_generations(self, run: Run) -> None:
        for page_id, generation in zip(run.page_ids, run.generations, strict=True):
            if self._generation(page_id) != generation:
                raise HandoffLostError("STALE_PAGE", f"page {page_id} was reused since it was sealed")

    def _end(self, lease: Lease, event: LeaseEvent, error: HeadraceError | None = None) -> None:
        """Free a lease, whatever ended it: the only place."""
        if lease.is_over:
            return
        lease.move(event)
        lease.outcome, lease.error = lease.state, error
        del self._by_key[lease.lease_key]
        del self._by_owner[lease.order.owner]
        self._on_end(lease)
        lease.move(LeaseEvent.FREE)
        self._on_change()
        if not self._by_key:
            self._idle.set()
