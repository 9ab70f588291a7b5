"""The prefill worker: a holder. Event loop only; the scheduler runs on the engine thread.

One Hold call is one lease, and `transfer.lease` draws its life; this file moves it by what the scheduler says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.v1 import hold_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace_core.batch.step_book import Failed, FetchReady
from headrace_core.beats import Outbox
from headrace_core.config import PrefillSettings
from headrace_core.engine.engine import News
from headrace_core.errors import InvalidRequestError, UnavailableError
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import hash_tokens
from headrace_core.tracing.span import Kind
from headrace_core.tracing.stages import Stages
from headrace_core.transfer.grpc import SERVICE as TRANSFER_SERVICE
from headrace_core.transfer.hold import HOLD_SERVICE, Held, add_hold_servicer
from headrace_core.transfer.holder import HeldCall, HolderSelf, PageHolder
from headrace_core.transfer.lease import Lease, LeaseTable
from headrace_core.transfer.sealer import Sealer
from headrace_core.transfer.taker import Taker
from headrace_core.transfer.transports import usable
from headrace_core.transfer.values import (
    FirstToken,
    Order,
    encode_first,
)
from headrace_core.transfer.verify import check_compatible
from headrace_core.worker.holder_ends import holder_ends
from headrace_core.worker.host import Loader, WorkerHost
from headrace_core.worker.loading import load_worker_model
from headrace_core.worker.prefix_fetcher import PrefixFetcher, model_taker
from prometheus_client import CollectorRegistry

from headrace_prefill.events import Admitted, Prefilled, PrefillEvent, Sealed
from headrace_prefill.layer_stops import LEAST_BYTES, LayerStops
from headrace_prefill.metrics import PrefillMetrics
from headrace_prefill.scheduler import PrefillScheduler

log = logging.getLogger(__name__)


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
        transports = transports or usable(settings.transport, has_tls=settings.tls is not None)
        self.registry = CollectorRegistry()
        self.metrics_port = 0
        self.addresses: Mapping[str, str] = {}
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
        self._holder: PageHolder | None = None
        self._ends = holder_ends(
            self.host,
            self._metrics.worker,
            transports,
            frame_bytes=settings.frame_kib << 10,
            leases=lambda: self.leases,
        )
        self._transports = transports
        self._taker: Taker | None = None
        self.fetcher = PrefixFetcher(self.host, self._metrics.worker)
        self._traces: dict[int, Stages] = {}
        """By lease."""

    @property
    def leases(self) -> LeaseTable:
        """The lease table.

        Raises:
            UnavailableError: STARTING.
        """
        return self._ready.leases

    @property
    def _ready(self) -> PageHolder:
        if self._holder is None:
            raise UnavailableError("STARTING", "the worker is loading its model; try again")
        return self._holder

    async def start(self) -> str:
        """See `process.Service`."""
        add_hold_servicer(self, self.host.server.grpc)
        for end in self._ends:
            end.serve(self.host.server.grpc)
        self.host.metrics_port = self.metrics_port
        address = await self.host.bind()
        model = await self.host.load(self._loader)
        settings = self._settings
        scheduler = PrefillScheduler(
            PageAllocator(model.num_pages, model.layout.page_size, num_lanes=model.num_lanes, tells_cache=True),
            model.limits,
            max_step_tokens=settings.max_step_tokens,
            max_step_sequences=settings.max_step_sequences,
            max_waiting_sequences=settings.max_waiting_sequences,
            layer_stops=LayerStops.of(model.layout, least_bytes=self._least_run_bytes),
            runs_mtp=model.mtp is not None,
        )
        host = self.host
        self._holder = PageHolder(
            HolderSelf(host.endpoint, host.incarnation, model.fingerprint, model.layout, self._ends),
            Sealer(model.pages, model.layout),
            generation=scheduler.pages.pool.generation,
            on_end=self._on_lease_end,
            on_change=self._on_lease_change,
        )
        self._taker = model_taker(model, self._transports, connect=host.connect, timeout_s=settings.transfer_timeout_s)
        self.fetcher.start(self._taker, timeout_s=settings.transfer_timeout_s)
        await self.host.go(model, scheduler, self._on_news, watch=scheduler)
        return address

    async def drain(self) -> None:
        """See `process.Service`: sequences under way are computed and taken."""
        self.host.begin_drain()
        if self._holder:
            await self._holder.leases.wait_idle()

    async def stop(self) -> None:
        """See `process.Service`."""
        if self._holder:
            self._holder.abort_all(UnavailableError("DRAINING", "the worker is going away; try another"))
        await self.fetcher.close()
        if self._taker:
            await self._taker.close()
        await self.host.stop()
        if self._holder:
            await self._holder.close()
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
        call = self._ready.open(order, outbox)
        lease = call.lease
        self._traces[lease.key] = Stages(self.host.tracer.join("lease", order.traceparent), "waiting")
        now, group, num_have = time.monotonic(), order.owner[0], order.num_have_pages
        num_cached = order.cached.num_tokens if order.cached else 0
        self.host.engine.submit(
            lambda scheduler: scheduler.add(
                lease.key, spec, now, group=group, num_have_pages=num_have, num_cached_elsewhere=num_cached
            )
        )
        return call

    def _on_news(self, news: News[PrefillEvent]) -> None:
        for event in news.events:
            call = self._ready.call(event.key)
            if call is None:
                continue
            trace = self._traces[event.key]
            match event:
                case FetchReady():
                    trace.next("prefix_fetch", kind=Kind.CLIENT)
                    self.fetcher.fetch(event, call.lease.order)
                case Admitted(num_cached_tokens=num_cached, queue_s=queue_s):
                    trace.next("computing")
                    self._ready.admit(call, num_cached_tokens=num_cached, queue_s=queue_s)
                case Sealed():
                    end_layer = self.host.model.layout.num_layers if event.end_layer is None else event.end_layer
                    layers = range(event.first_layer, end_layer)
                    self._ready.seal(call, event.first_page, event.pages, layers, event.mark)
                case Prefilled():
                    trace.next("held")
                    self._on_prefilled(call, event)
                case Failed(error=error):
                    self.leases.abort(call.lease, error)

    def _on_prefilled(self, call: HeldCall, event: Prefilled) -> None:
        lease, spec = call.lease, call.lease.order.spec
        self.leases.complete(lease)
        self._report(call, event)
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
        call.outbox.put(pb.HoldResponse(last=encode_first(first)))
        # The taker ends the call, when it has heard that: until then it may read what it was told of before.
        call.is_finished = event.finish is not None

    def _on_lease_end(self, lease: Lease) -> None:
        self.host.engine.submit(lambda scheduler: scheduler.free(lease.key))
        self.fetcher.cancel(lease.key)
        assert lease.outcome is not None, "the lease ended"
        reason = lease.error.reason if lease.error else ""
        self._traces.pop(lease.key).end(reason, {"headrace.runs": len(lease.runs)})
        self._metrics.worker.lease_ends.labels(lease.outcome.value).inc()

    def _on_lease_change(self) -> None:
        num_held = self.leases.num_held
        self._metrics.worker.leases.set(num_held)
        self.host.board.set_num_leases(num_held)

    def _report(self, call: HeldCall, prefilled: Prefilled) -> None:
        spec, worker = call.lease.order.spec, self._metrics.worker
        num_tokens = len(spec.token_ids)
        worker.prefilled_tokens.inc(num_tokens)
        worker.sampled_tokens.inc()
        worker.cache_query_tokens.inc(num_tokens)
        worker.cache_hit_tokens.inc(prefilled.num_cached_tokens)
        worker.queue_seconds.observe(call.queue_s)
        self._metrics.prefill_seconds.observe(prefilled.compute_s)
        data: dict[str, Any] = {
            "request_id": spec.request_id,
            "sample": spec.sample_index,
            "attempt": spec.attempt,
            "tokens": num_tokens,
            "cached_tokens": prefilled.num_cached_tokens,
            "chunks": prefilled.num_chunks,
            "queue_s": call.queue_s,
            "prefill_s": prefilled.compute_s,
            "pages": prefilled.num_pages,
            "bytes": prefilled.num_pages * self.host.model.layout.page_bytes,
        }
        log.info("prefilled", extra=data)
        span = self._traces[call.lease.key].span
        if span.is_recorded:
            span.set({f"headrace.{name}": value for name, value in data.items()})
