"""Leases: who may still read a sequence's pages, and the one place where holding them ends. Event loop only.

    CREATED ──first token sampled, ticket written──► HELD ──released by the taker──► TAKEN ───┐
       │                                               ├──not renewed in time──────► EXPIRED ─┼──► FREED
       └──────cancelled, failed, higher attempt────────┴───────────────────────────► ABORTED ─┘

A lease spans a sequence's whole life here: CREATED while it waits and runs, so that abort and fencing work in every
phase. `_end` is the only way out; it hands the sequence's pages back, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from headrace_core.errors import HandoffLostError, HeadraceError, TransferCorruptError, UnavailableError


def cancelled() -> HeadraceError:
    """Return what is told to whoever waits for a prefill that was cancelled."""
    return UnavailableError("CANCELLED", "the prefill was cancelled")


class LeaseState(Enum):
    """See the module."""

    CREATED = "created"
    HELD = "held"
    TAKEN = "taken"
    EXPIRED = "expired"
    ABORTED = "aborted"
    FREED = "freed"


@dataclass(slots=True, eq=False)
class Lease:
    """One sequence's. `key` names it in the scheduler."""

    key: int
    lease_id: str
    request_id: str
    sample_index: int
    attempt: int
    state: LeaseState = LeaseState.CREATED
    outcome: LeaseState | None = None
    error: HeadraceError | None = None
    """Why it was aborted."""
    page_ids: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    tokens_sha256: bytes = b""
    timer: asyncio.TimerHandle | None = None


class LeaseTable:
    """Every lease of one process; implements `LeaseHolder`."""

    def __init__(
        self,
        *,
        incarnation: int,
        lease_s: float,
        generation: Callable[[int], int],
        on_end: Callable[[Lease], None],
        on_change: Callable[[], None],
    ) -> None:
        """Args: `generation` tells a page's now; `on_end` frees the pages, called once a lease with `outcome` set."""
        self._incarnation = incarnation
        self._lease_s = lease_s
        self._generation = generation
        self._on_end = on_end
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._by_id: dict[str, Lease] = {}
        self._by_request: dict[tuple[str, int], Lease] = {}
        self._num_created = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_held(self) -> int:
        """Leases whose pages wait for a taker."""
        return sum(lease.state is LeaseState.HELD for lease in self._by_id.values())

    @property
    def leases(self) -> Sequence[Lease]:
        """Those not yet freed."""
        return list(self._by_id.values())

    def create(self, request_id: str, *, sample_index: int, attempt: int) -> Lease:
        """Return a new lease; one of a lower attempt of the same sample is aborted.

        Raises:
            HandoffLostError: STALE_ATTEMPT, this or a higher attempt is here already.
        """
        current = self._by_request.get((request_id, sample_index))
        if current and current.attempt >= attempt:
            raise HandoffLostError("STALE_ATTEMPT", f"attempt {attempt} comes after attempt {current.attempt}")
        if current:
            self.abort(current, HandoffLostError("STALE_ATTEMPT", f"attempt {attempt} replaced this one"))
        self._num_created += 1
        lease = Lease(self._num_created, f"lease-{self._num_created}", request_id, sample_index, attempt)
        self._by_id[lease.lease_id] = self._by_request[request_id, sample_index] = lease
        self._idle.clear()
        return lease

    def hold(self, lease: Lease, page_ids: tuple[int, ...], generations: tuple[int, ...], tokens_sha256: bytes) -> None:
        """Start the lease's duration; its ticket goes out now. `tokens_sha256` says which tokens the pages hold."""
        assert lease.state is LeaseState.CREATED, f"a lease is held once, not when {lease.state}"
        lease.state, lease.page_ids, lease.generations = LeaseState.HELD, page_ids, generations
        lease.tokens_sha256 = tokens_sha256
        self._start_timer(lease)
        self._on_change()

    def abort(self, lease: Lease, error: HeadraceError) -> None:
        """End a lease whose sequence is not wanted any more; whoever waits for it gets `error`. Idempotent."""
        if lease.outcome is None:
            lease.error = error
        self._end(lease, LeaseState.ABORTED)

    def abort_attempts(self, request_id: str, *, sample_index: int, attempt: int) -> None:
        """Abort a sample's lease, cancelled, unless it is of a higher attempt. One that is not here is no error."""
        current = self._by_request.get((request_id, sample_index))
        if current and current.attempt <= attempt:
            self.abort(current, cancelled())

    def take(self, lease: Lease) -> None:
        """End a lease that fulfilled its purpose. Idempotent."""
        self._end(lease, LeaseState.TAKEN)

    def held_pages(self, lease_id: str, *, attempt: int, incarnation: int, tokens_sha256: bytes) -> Sequence[int]:
        """See `LeaseHolder`."""
        lease = self._held(lease_id, incarnation)
        if attempt != lease.attempt:
            raise HandoffLostError("STALE_ATTEMPT", f"the ticket is of attempt {attempt}, the lease of {lease.attempt}")
        if tokens_sha256 != lease.tokens_sha256:
            raise TransferCorruptError("TOKENS_MISMATCH", "the pages hold other tokens than the taker's; prefill again")
        for page_id, generation in zip(lease.page_ids, lease.generations, strict=True):
            if self._generation(page_id) != generation:
                raise HandoffLostError("STALE_PAGE", f"page {page_id} was reused since the ticket was written")
        return lease.page_ids

    def renew(self, lease_id: str, *, incarnation: int) -> float:
        """See `LeaseHolder`."""
        self._start_timer(self._held(lease_id, incarnation))
        return self._lease_s

    def release(self, lease_id: str, *, incarnation: int) -> None:
        """See `LeaseHolder`."""
        self._check_incarnation(incarnation)
        lease = self._by_id.get(lease_id)
        if lease and lease.state is LeaseState.HELD:
            self.take(lease)

    async def wait_idle(self) -> None:
        """Return when no lease is left."""
        await self._idle.wait()

    def _held(self, lease_id: str, incarnation: int) -> Lease:
        self._check_incarnation(incarnation)
        lease = self._by_id.get(lease_id)
        if lease is None or lease.state is not LeaseState.HELD:
            raise HandoffLostError("LEASE_EXPIRED", f"{lease_id[:80]} is not held: expired, released or aborted")
        return lease

    def _check_incarnation(self, incarnation: int) -> None:
        if incarnation != self._incarnation:
            raise HandoffLostError("WORKER_RESTARTED", "the ticket is of an earlier process at this address")

    def _start_timer(self, lease: Lease) -> None:
        if lease.timer:
            lease.timer.cancel()
        lease.timer = self._loop.call_later(self._lease_s, self._end, lease, LeaseState.EXPIRED)

    def _end(self, lease: Lease, outcome: LeaseState) -> None:
        """Free a lease, whatever ended it: the only place."""
        if lease.state is LeaseState.FREED:
            return
        lease.state = lease.outcome = outcome
        if lease.timer:
            lease.timer.cancel()
        del self._by_id[lease.lease_id]
        del self._by_request[lease.request_id, lease.sample_index]
        self._on_end(lease)
        lease.state = LeaseState.FREED
        self._on_change()
        if not self._by_id:
            self._idle.set()
