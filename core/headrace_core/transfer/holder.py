"""The holding side of hand-offs in one worker: its calls, their leases and sealed runs. Event loop only.

One Hold call is one lease, and `lease` draws its life; whoever has a scheduler moves it by what that says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from headrace.v1 import hold_service_pb2 as pb

from headrace_core.batch.step import Mark
from headrace_core.beats import Outbox
from headrace_core.errors import HandoffLostError, HeadraceError
from headrace_core.kv.layout import KvLayout
from headrace_core.transfer.lease import Lease, LeaseTable
from headrace_core.transfer.sealer import Pages, Sealer
from headrace_core.transfer.states import LeaseState
from headrace_core.transfer.transport import HolderEnd
from headrace_core.transfer.values import Admission, Order, Run, Shard, encode_admission, encode_run

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class HeldCall:
    """One call. See `hold.Held`."""

    leases: LeaseTable
    lease: Lease
    outbox: Outbox[pb.HoldResponse]
    queue_s: float = 0.0
    """Until it was admitted."""
    is_finished: bool = False
    """Whether the first token ended the sequence: nothing is to be taken."""

    def confirm(self) -> None:
        """See `hold.Held`."""
        self.leases.confirm(self.lease)
        self.outbox.put(pb.HoldResponse(confirmed=pb.Confirmed()))
        self.outbox.close()

    def end(self) -> None:
        """See `hold.Held`."""
        if self.is_finished:
            self.leases.take(self.lease)
        else:
            self.leases.abort(self.lease, HandoffLostError("TAKER_LOST", "the taker ended the call"))


@dataclass(frozen=True, slots=True)
class HolderSelf:
    """Who the holder is to its takers: where it can be read, which process of which model it is."""

    endpoint: str
    incarnation: int
    fingerprint: str
    layout: KvLayout
    ends: Sequence[HolderEnd]


class PageHolder:
    """See the module."""

    def __init__(
        self,
        me: HolderSelf,
        sealer: Sealer,
        *,
        generation: Callable[[int], int],
        on_end: Callable[[Lease], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Args: `generation` and `on_change` as for `LeaseTable`; `on_end` frees a lease's pages, once."""
        self._me = me
        self._sealer = sealer
        self._on_end = on_end
        self._calls: dict[int, HeldCall] = {}
        self._sealing: set[asyncio.Task[None]] = set()
        self.leases = LeaseTable(
            incarnation=me.incarnation, generation=generation, on_end=self._on_lease_end, on_change=on_change
        )

    def open(self, order: Order, outbox: Outbox[pb.HoldResponse]) -> HeldCall:
        """Begin to hold what is ordered; events go into `outbox`, which is closed at the end.

        Raises:
            HandoffLostError: STALE_ATTEMPT.
        """
        lease = self.leases.create(order)
        call = self._calls[lease.key] = HeldCall(self.leases, lease, outbox)
        return call

    def call(self, key: int) -> HeldCall | None:
        """Return the call of this key; None when it is over."""
        return self._calls.get(key)

    def admit(self, call: HeldCall, *, num_cached_tokens: int, queue_s: float = 0.0) -> None:
        """Tell the taker that its sequence has pages."""
        me, call.queue_s = self._me, queue_s
        self.leases.admit(call.lease)
        offers = tuple(offer for end in me.ends if (offer := end.offer()) is not None)
        admission = Admission(
            fingerprint=me.fingerprint,
            layout=me.layout,
            lease_key=call.lease.lease_key,
            num_cached_tokens=num_cached_tokens,
            queue_s=queue_s,
            shards=(Shard(me.endpoint, me.incarnation, 0, me.layout.num_layers, offers),),
        )
        call.outbox.put(pb.HoldResponse(admitted=encode_admission(admission)))

    def seal(self, call: HeldCall, first_page: int, pages: Pages, layers: range, mark: Mark | None = None) -> None:
        """Let the taker have these layers of pages, which nothing writes any more; `mark` as for `Sealer.seal`."""
        for start, part in self._sealer.parts(first_page, pages, num_layers=len(layers)):
            sealing = asyncio.ensure_future(self._publish(call, self._sealer.seal(start, part, layers, mark)))
            self._sealing.add(sealing)
            sealing.add_done_callback(self._sealing.discard)

    def abort_all(self, error: HeadraceError) -> None:
        """End every lease; whoever waits gets `error`."""
        for lease in self.leases.leases:
            self.leases.abort(lease, error)

    async def close(self) -> None:
        """End the thread that seals, after `abort_all`."""
        if self._sealing:
            await asyncio.wait(self._sealing)
        self._sealer.close()

    async def _publish(self, call: HeldCall, sealing: Awaitable[Run]) -> None:
        try:
            run = await sealing
            if not call.lease.is_over:
                self.leases.seal(call.lease, run)
                call.outbox.put(pb.HoldResponse(run=encode_run(run)))
        except Exception as error:
            log.error("sealing failed", extra={"request_id": call.lease.order.spec.request_id}, exc_info=error)
            self.leases.abort(call.lease, HeadraceError("BUG", "internal error"))

    def _on_lease_end(self, lease: Lease) -> None:
        call = self._calls.pop(lease.key)
        self._on_end(lease)
        if lease.outcome is LeaseState.ABORTED:
            call.outbox.close(lease.error)
