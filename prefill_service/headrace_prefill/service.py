"""The prefill worker: a holder. Event loop only; the scheduler runs on the engine thread.

One Hold call is one lease, and `transfer.lease` draws its life; this file moves it by what the scheduler says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.v1 import hold_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace_core.batch.step_book import Failed
from headrace_core.beats import Outbox
from headrace_core.config import PrefillSettings
from headrace_core.engine.engine import News
from headrace_core.errors import HandoffLostError, HeadraceError, InvalidRequestError, UnavailableError
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import hash_tokens
from headrace_core.transfer.grpc import SERVICE as TRANSFER_SERVICE
from headrace_core.transfer.hold import HOLD_SERVICE, Held, add_hold_servicer
from headrace_core.transfer.lease import Lease, LeaseTable
from headrace_core.transfer.sealer import Sealer
from headrace_core.transfer.states import LeaseState
from headrace_core.transfer.transport import Holding
from headrace_core.transfer.transports import TRANSPORTS, usable
from headrace_core.transfer.values import (
    Admission,
    FirstToken,
    Order,
    Run,
    Shard,
    encode_admission,
    encode_first,
    encode_run,
)
from headrace_core.transfer.verify import check_compatible
from headrace_core.worker.host import Loader, WorkerHost
from headrace_core.worker.loading import load_worker_model
from prometheus_client import CollectorRegistry

from headrace_prefill.events import Admitted, FetchReady, Prefilled, PrefillEvent, Sealed
from headrace_prefill.layer_stops import LEAST_BYTES, LayerStops
from headrace_prefill.metrics import PrefillMetrics
from headrace_prefill.prefix_fetcher import PrefixFetcher
from headrace_prefill.scheduler import PrefillScheduler

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Held:
    """One call. See `hold.Held`."""

    service: PrefillService
    lease: Lease
    outbox: Outbox[pb.HoldResponse]
    queue_s: float = 0.0
    is_finished: bool = False
    """Whether the first token ended the sequence: nothing is to be taken."""

    def confirm(self) -> None:
        """See `hold.Held`."""
        self.service.leases.confirm(self.lease)
        self.outbox.put(pb.HoldResponse(confirmed=pb.Confirmed()))
        self.outbox.close()

    def end(self) -> None:
        """See `hold.Held`."""
        if self.is_finished:
            self.service.leases.take(self.lease)
        else:
            self.service.leases.abort(self.lease, HandoffLostError("TAKER_LOST", "the taker ended the call"))


class PrefillService:
    """See `process.Service`. Tests give what follows `settings`."""

    def __init__(
        self,
        settings: PrefillSettings,
        *,
        loader: Loader = load_worker_model,
        transports: Sequence[str] = (),
        least_run_bytes: int = LEAST_BYTES,
    ) -> None:
        transports = transports or usable(settings.transport)
        self.registry = CollectorRegistry()
        self._metrics = PrefillMetrics(self.registry)
        self._settings = settings
        self._loader = loader
        self._least_run_bytes = least_run_bytes
        self.host: WorkerHost[PrefillScheduler] = WorkerHost(
            settings,
            role=types_pb2.WORKER_ROLE_PREFILL,
            services=[HOLD_SERVICE, TRANSFER_SERVICE],
            transports=transports,
            metrics=self._metrics.worker,
        )
        self.failed = self.host.failed
        self._leases: LeaseTable | None = None
        self._held: dict[int, _Held] = {}
        self._ends = [TRANSPORTS[name].holder(self._holding(name)) for name in transports]
        self.fetcher = PrefixFetcher(self.host, self._metrics, transports=transports)
        self._sealing: set[asyncio.Task[None]] = set()
        self._sealer: Sealer | None = None

    @property
    def leases(self) -> LeaseTable:
        """The lease table.

        Raises:
            UnavailableError: STARTING.
        """
        if self._leases is None:
            raise UnavailableError("STARTING", "the worker is loading its model; try again")
        return self._leases

    async def start(self) -> str:
        """See `process.Service`."""
        add_hold_servicer(self, self.host.server.grpc)
        for end in self._ends:
            end.serve(self.host.server.grpc)
        address = await self.host.bind()
        model = await self.host.load(self._loader)
        settings = self._settings
        scheduler = PrefillScheduler(
            PageAllocator(model.num_pages, model.layout.page_size),
            model.limits,
            max_step_tokens=settings.max_step_tokens,
            max_step_sequences=settings.max_step_sequences,
            max_waiting_sequences=settings.max_waiting_sequences,
            layer_stops=LayerStops.of(model.layout, least_bytes=self._least_run_bytes),
        )
        self._leases = LeaseTable(
            incarnation=self.host.incarnation,
            generation=scheduler.pages.pool.generation,
            on_end=self._on_lease_end,
            on_change=self._on_lease_change,
        )
        self._sealer = Sealer(model.cache, model.layout)
        self.fetcher.start(model, timeout_s=settings.transfer_timeout_s)
        await self.host.go(model, scheduler, self._on_news, watch=scheduler)
        return address

    async def drain(self) -> None:
        """See `process.Service`: sequences under way are computed and taken."""
        self.host.begin_drain()
        if self._leases:
            await self._leases.wait_idle()

    async def stop(self) -> None:
        """See `process.Service`."""
        for lease in self._leases.leases if self._leases else ():
            self.leases.abort(lease, UnavailableError("DRAINING", "the worker is going away; try another"))
        await self.fetcher.close()
        await self.host.stop()
        if self._sealing:
            await asyncio.wait(self._sealing)
        if self._sealer:
            self._sealer.close()
        for end in self._ends:
            end.close()

    def hold(self, order: Order, outbox: Outbox[pb.HoldResponse]) -> Held:
        """See `hold.Holder`."""
        self.host.require_ready()
        model, spec = self.host.model, order.spec
        if order.holder_incarnation is not None:
            raise InvalidRequestError("BAD_REQUEST", "a prefill worker gives what it computes, not what it has cached")
        check_compatible(order.fingerprint, order.layout, ours=(model.fingerprint, model.layout), who="the taker")
        spec.check(model.limits)
        lease = self.leases.create(order)
        held = self._held[lease.key] = _Held(self, lease, outbox)
        now, group, num_have = time.monotonic(), order.owner[0], order.num_have_pages
        num_cached = order.cached.num_tokens if order.cached else 0
        self.host.engine.submit(
            lambda scheduler: scheduler.add(
                lease.key, spec, now, group=group, num_have_pages=num_have, num_cached_elsewhere=num_cached
            )
        )
        return held

    def _holding(self, name: str) -> Holding:
        return Holding(
            holder=lambda: self.leases,
            memory=lambda: self.host.model.cache,
            incarnation=self.host.incarnation,
            frame_bytes=self._settings.frame_kib << 10,
            on_sent=self._metrics.worker.transfer_bytes.labels(name, "sent").inc,
            shared=lambda: self.host.model.memory,
        )

    def _on_news(self, news: News[PrefillEvent]) -> None:
        for event in news.events:
            held = self._held.get(event.key)
            if held is None:
                continue
            match event:
                case FetchReady():
                    self.fetcher.fetch(event, held.lease.order)
                case Admitted():
                    self._on_admitted(held, event)
                case Sealed():
                    self._seal(held, event)
                case Prefilled():
                    self._on_prefilled(held, event)
                case Failed(error=error):
                    self.leases.abort(held.lease, error)

    def _on_admitted(self, held: _Held, event: Admitted) -> None:
        model = self.host.model
        self.leases.admit(held.lease)
        held.queue_s = event.queue_s
        offers = tuple(offer for end in self._ends if (offer := end.offer()) is not None)
        admission = Admission(
            fingerprint=model.fingerprint,
            layout=model.layout,
            lease_key=held.lease.lease_key,
            num_cached_tokens=event.num_cached_tokens,
            queue_s=event.queue_s,
            shards=(Shard(self.host.endpoint, self.host.incarnation, 0, model.layout.num_layers, offers),),
        )
        held.outbox.put(pb.HoldResponse(admitted=encode_admission(admission)))

    def _on_prefilled(self, held: _Held, event: Prefilled) -> None:
        lease, spec = held.lease, held.lease.order.spec
        self.leases.complete(lease)
        self._report(held, event)
        assert spec.params.seed is not None, "checked at the door"
        first = FirstToken(
            num_tokens=len(event.token_ids),
            # Of what was computed, not of what was asked for: so a mix-up in between shows.
            tokens_sha256=hash_tokens(event.token_ids),
            token=event.token,
            seed=spec.params.seed,
            sample_index=spec.sample_index,
            finish=event.finish,
            compute_s=event.compute_s,
        )
        held.outbox.put(pb.HoldResponse(last=encode_first(first)))
        # The taker ends the call, when it has heard that: until then it may read what it was told of before.
        held.is_finished = event.finish is not None

    def _seal(self, held: _Held, sealed: Sealed) -> None:
        """Let the taker have pages that nothing writes any more."""
        sealer, end_layer = self._sealer, sealed.end_layer
        assert sealer is not None, "ready"
        layers = range(sealed.first_layer, self.host.model.layout.num_layers if end_layer is None else end_layer)
        for start, part in sealer.parts(sealed.first_page, sealed.pages, num_layers=len(layers)):
            sealing = asyncio.ensure_future(self._publish(held, sealer.seal(start, part, layers, sealed.mark)))
            self._sealing.add(sealing)
            sealing.add_done_callback(self._sealing.discard)

    async def _publish(self, held: _Held, sealing: Awaitable[Run]) -> None:
        try:
            run = await sealing
            if not held.lease.is_over:
                self.leases.seal(held.lease, run)
                held.outbox.put(pb.HoldResponse(run=encode_run(run)))
        except Exception as error:
            log.error("sealing failed", extra={"request_id": held.lease.order.spec.request_id}, exc_info=error)
            self.leases.abort(held.lease, HeadraceError("BUG", "internal error"))

    def _on_lease_end(self, lease: Lease) -> None:
        self.host.engine.submit(lambda scheduler: scheduler.free(lease.key))
        self.fetcher.cancel(lease.key)
        held = self._held.pop(lease.key)
        assert lease.outcome is not None, "the lease ended"
        self._metrics.lease_ends.labels(lease.outcome.value).inc()
        if lease.outcome is LeaseState.ABORTED:
            held.outbox.close(lease.error)

    def _on_lease_change(self) -> None:
        num_held = self.leases.num_held
        self._metrics.leases.set(num_held)
        self.host.board.set_num_leases(num_held)

    def _report(self, held: _Held, prefilled: Prefilled) -> None:
        spec, worker = held.lease.order.spec, self._metrics.worker
        num_tokens = len(spec.token_ids)
        worker.prompt_tokens.inc(num_tokens)
        worker.output_tokens.inc()
        worker.cache_query_tokens.inc(num_tokens)
        worker.cache_hit_tokens.inc(prefilled.num_cached_tokens)
        worker.queue_seconds.observe(held.queue_s)
        self._metrics.prefill_seconds.observe(prefilled.compute_s)
        data: dict[str, Any] = {
            "request_id": spec.request_id,
            "sample": spec.sample_index,
            "attempt": spec.attempt,
            "tokens": num_tokens,
            "cached_tokens": prefilled.num_cached_tokens,
            "queue_s": held.queue_s,
            "prefill_s": prefilled.compute_s,
            "pages": prefilled.num_pages,
            "bytes": prefilled.num_pages * self.host.model.layout.page_bytes,
        }
        log.info("prefilled", extra=data)
