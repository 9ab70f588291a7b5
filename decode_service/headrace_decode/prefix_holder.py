"""Lets others take what this worker's prefix cache has.

It is an answer's way back, into its next turn's prompt, and a sequence's way out, when this worker drains.

A holder as a prefill worker is one (`transfer.holder`), of pages that are there already. Event loop only.
"""

from __future__ import annotations

from collections.abc import Callable

from headrace.v1 import hold_service_pb2 as pb
from headrace_core.beats import Outbox
from headrace_core.errors import HandoffLostError, InvalidRequestError, UnavailableError
from headrace_core.transfer.holder import HeldCall, HolderSelf, PageHolder
from headrace_core.transfer.lease import Lease, LeaseTable
from headrace_core.transfer.sealer import Sealer
from headrace_core.transfer.values import Order, Owner
from headrace_core.transfer.verify import check_compatible
from headrace_core.worker.holder_ends import holder_ends
from headrace_core.worker.host import WorkerHost
from headrace_core.worker.loading import LoadedModel

from headrace_decode.held_prefixes import PrefixHeld
from headrace_decode.metrics import DecodeMetrics
from headrace_decode.scheduler import DecodeScheduler


class PrefixHolder:
    """See the module and `hold.Holder`."""

    def __init__(
        self,
        host: WorkerHost[DecodeScheduler],
        metrics: DecodeMetrics,
        *,
        transports: tuple[str, ...],
        frame_bytes: int,
        is_ours: Callable[[Owner], bool],
    ) -> None:
        """Args: `is_ours` tells whether a sequence is here, running or set aside: while draining, these alone."""
        self._is_ours = is_ours
        self._host = host
        self._metrics = metrics
        self._pages: PageHolder | None = None
        self.ends = holder_ends(host, metrics.worker, transports, frame_bytes=frame_bytes, leases=lambda: self.leases)

    @property
    def leases(self) -> LeaseTable:
        """The lease table.

        Raises:
            UnavailableError: STARTING.
        """
        return self._ready.leases

    @property
    def _ready(self) -> PageHolder:
        if self._pages is None:
            raise UnavailableError("STARTING", "the worker is loading its model; try again")
        return self._pages

    def start(self, model: LoadedModel, generation: Callable[[int], int]) -> None:
        """Be ready to hold pages of a model; `generation` tells a page's now."""
        host = self._host
        me = HolderSelf(host.endpoint, host.incarnation, model.fingerprint, model.layout, self.ends)
        sealer = Sealer(model.pages, model.layout)
        self._pages = PageHolder(me, sealer, generation=generation, on_end=self._on_end, on_change=self._on_change)

    def hold(self, order: Order, outbox: Outbox[pb.HoldResponse]) -> HeldCall:
        """See `hold.Holder`."""
        host, spec = self._host, order.spec
        if not self._is_ours(order.owner):
            host.require_ready()
        spec.check_attempt()
        if order.holder_incarnation is None:
            raise InvalidRequestError(
                "BAD_REQUEST", "a decode worker computes nothing for others; it gives what it has"
            )
        if order.holder_incarnation != host.incarnation:
            raise HandoffLostError("WORKER_RESTARTED", "the prefix was with an earlier process at this address")
        most_tokens = host.model.limits.max_context_tokens
        if len(spec.token_ids) > most_tokens:  # it is kept as long as the call stands, whoever ordered it
            raise InvalidRequestError(
                "PROMPT_TOO_LONG",
                f"{len(spec.token_ids)} tokens; this worker has no more than {most_tokens} of any sequence",
            )
        ours = (host.model.fingerprint, host.model.layout)
        check_compatible(order.fingerprint, order.layout, ours=ours, who="the taker")
        call = self._ready.open(order, outbox)
        number, num_have = call.lease.key, order.num_have_pages
        host.engine.submit(lambda s: s.prefixes.hold(number, spec.token_ids, num_have_pages=num_have))
        return call

    def on_held(self, event: PrefixHeld) -> None:
        """Tell the taker what there is."""
        call = self._ready.call(event.hold)
        if call is None:
            return
        self._ready.admit(call, num_cached_tokens=event.num_tokens)
        self._ready.leases.complete(call.lease)
        layers = range(self._host.model.layout.num_layers)
        self._ready.seal(call, call.lease.order.num_have_pages, event.pages, layers)

    def stop(self) -> None:
        """Let everything go."""
        if self._pages is not None:
            self._pages.abort_all(UnavailableError("DRAINING", "the worker is going away"))

    async def close(self) -> None:
        """End what runs in the background, after `stop` and the engine."""
        if self._pages is not None:
            await self._pages.close()
        for end in self.ends:
            end.close()

    def _on_end(self, lease: Lease) -> None:
        assert lease.outcome is not None, "the lease ended"
        self._metrics.worker.lease_ends.labels(lease.outcome.value).inc()
        self._host.engine.submit(lambda s: s.prefixes.let_go(lease.key))

    def _on_change(self) -> None:
        num_held = self._ready.leases.num_held
        self._metrics.worker.leases.set(num_held)
        self._host.board.set_num_leases(num_held)
