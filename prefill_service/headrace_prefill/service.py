"""The prefill worker: from a request to a ticket. Event loop only; the scheduler runs on the engine thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.v1 import types_pb2
from headrace_core.batch.spec import SequenceSpec
from headrace_core.batch.step_book import Failed
from headrace_core.config import PrefillSettings
from headrace_core.engine.engine import News
from headrace_core.errors import UnavailableError
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import hash_tokens
from headrace_core.transfer.grpc import SERVICE as TRANSFER_SERVICE
from headrace_core.transfer.grpc import GrpcHolder
from headrace_core.transfer.lease import Lease, LeaseState, LeaseTable, cancelled
from headrace_core.transfer.ticket import Ticket
from headrace_core.transfer.verify import run_to_its_end, seal_pages
from headrace_core.worker.host import Loader, WorkerHost
from headrace_core.worker.loading import LoadedModel, load_worker_model
from prometheus_client import CollectorRegistry

from headrace_prefill.metrics import PrefillMetrics
from headrace_prefill.scheduler import Prefilled, PrefillEvent, PrefillScheduler
from headrace_prefill.server import PREFILL_SERVICE, add_prefill_servicer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """What `PrefillResponse` tells; `ticket` has no lease if `prefilled.finish` is set."""

    ticket: Ticket
    prefilled: Prefilled


class PrefillService:
    """See `process.Service`. Tests give `loader` and further `offers`."""

    def __init__(
        self,
        settings: PrefillSettings,
        *,
        loader: Loader = load_worker_model,
        offers: Sequence[types_pb2.TransportOffer] = (),
    ) -> None:
        self.registry = CollectorRegistry()
        self._metrics = PrefillMetrics(self.registry)
        self._settings = settings
        self._loader = loader
        self.host: WorkerHost[PrefillScheduler] = WorkerHost(
            settings,
            role=types_pb2.WORKER_ROLE_PREFILL,
            services=[PREFILL_SERVICE, TRANSFER_SERVICE],
            transports=["grpc"],
            metrics=self._metrics.worker,
        )
        self.failed = self.host.failed
        self._leases: LeaseTable | None = None
        self._waiting: dict[int, asyncio.Future[Prefilled]] = {}
        self._grpc_holder = GrpcHolder(
            lambda: self.leases,
            lambda: self.host.model.cache,
            frame_bytes=settings.frame_kib << 10,
            on_sent=self._metrics.worker.transfer_bytes.labels("grpc", "sent").inc,
        )
        self._offers = (*offers, self._grpc_holder.offer())

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
        add_prefill_servicer(self, self.host.server.grpc)
        self._grpc_holder.add_to(self.host.server.grpc)
        address = await self.host.bind()
        model = await self.host.load(self._loader)
        settings = self._settings
        scheduler = PrefillScheduler(
            PageAllocator(model.num_pages, model.layout.page_size),
            model.limits,
            max_step_tokens=settings.max_step_tokens,
            max_step_sequences=settings.max_step_sequences,
            max_waiting_sequences=settings.max_waiting_sequences,
        )
        self._leases = LeaseTable(
            incarnation=self.host.incarnation,
            lease_s=settings.lease_s,
            generation=scheduler.pages.pool.generation,
            on_end=self._on_lease_end,
            on_change=self._on_lease_change,
        )
        await self.host.go(model, scheduler, self._on_news)
        return address

    async def drain(self) -> None:
        """See `process.Service`: sequences under way finish, leases are released or expire."""
        self.host.begin_drain()
        if self._leases:
            await self._leases.wait_idle()

    async def stop(self) -> None:
        """See `process.Service`."""
        for lease in self._leases.leases if self._leases else ():
            self.leases.abort(lease, UnavailableError("DRAINING", "the worker is going away; try another"))
        await self.host.stop()

    async def prefill(self, spec: SequenceSpec) -> PrefillOutcome:
        """Prefill one sequence and hold its pages under a lease. Cancelling frees everything.

        Raises:
            HeadraceError: as `PrefillService.Prefill` lists.
        """
        self.host.require_ready()
        model = self.host.model
        spec.check(model.limits)
        lease = self.leases.create(spec.request_id, sample_index=spec.sample_index, attempt=spec.attempt)
        waiting: asyncio.Future[Prefilled] = asyncio.get_running_loop().create_future()
        self._waiting[lease.key] = waiting
        now = time.monotonic()
        self.host.engine.submit(lambda scheduler: scheduler.add(lease.key, spec, now))
        try:
            prefilled = await waiting
            ticket = await self._write_ticket(lease, spec, prefilled, model)
        except BaseException:
            self.leases.abort(lease, cancelled())
            raise
        finally:
            del self._waiting[lease.key]
        self._report(spec, prefilled, ticket)
        return PrefillOutcome(ticket, prefilled)

    def cancel(self, request_id: str, *, sample_index: int, attempt: int) -> None:
        """Abort this and earlier attempts of a sample, whatever their phase; one that is not here is no error."""
        if self._leases:
            self._leases.abort_attempts(request_id, sample_index=sample_index, attempt=attempt)

    async def _write_ticket(self, lease: Lease, spec: SequenceSpec, prefilled: Prefilled, model: LoadedModel) -> Ticket:
        """Put the pages under the lease and describe them; a finished sequence has nothing to hand off."""
        page_ids, generations, sums = prefilled.page_ids, prefilled.generations, ()
        # Of what was computed, not of what was asked for: so a mix-up in between shows.
        tokens_sha256 = hash_tokens(prefilled.token_ids)
        if prefilled.finish:
            page_ids, generations = (), ()
            self.leases.take(lease)
        else:
            # Off the loop: hashing a long prompt's pages takes tens of milliseconds.
            sums = await run_to_its_end(seal_pages, model.cache, model.layout.num_layers, page_ids)
            if lease.error:
                raise lease.error
            self.leases.hold(lease, page_ids, generations, tokens_sha256)
        assert spec.params.seed is not None, "checked at the door"
        return Ticket(
            request_id=spec.request_id,
            attempt=spec.attempt,
            holder_endpoint=self.host.endpoint,
            holder_incarnation=self.host.incarnation,
            model_fingerprint=model.fingerprint,
            layout=model.layout,
            page_ids=page_ids,
            generations=generations,
            checksums=sums,
            num_tokens=len(prefilled.token_ids),
            tokens_sha256=tokens_sha256,
            first_token=prefilled.token,
            seed=spec.params.seed,
            sample_index=spec.sample_index,
            lease_id="" if prefilled.finish else lease.lease_id,
            lease_s=0.0 if prefilled.finish else self._settings.lease_s,
            offers=self._offers,
        )

    def _on_news(self, news: News[PrefillEvent]) -> None:
        for event in news.events:
            waiting = self._waiting.get(event.key)
            if waiting is None or waiting.done():
                continue
            match event:
                case Prefilled():
                    waiting.set_result(event)
                case Failed():
                    waiting.set_exception(event.error)

    def _on_lease_end(self, lease: Lease) -> None:
        self.host.engine.submit(lambda scheduler: scheduler.free(lease.key))
        assert lease.outcome is not None, "the lease ended"
        self._metrics.lease_ends.labels(lease.outcome.value).inc()
        if lease.outcome is LeaseState.EXPIRED:
            self._metrics.worker.handoff_failures.labels("LEASE_EXPIRED").inc()
            log.warning("lease expired", extra={"request_id": lease.request_id, "pages": len(lease.page_ids)})
        waiting = self._waiting.get(lease.key)
        if waiting and not waiting.done():
            assert lease.error is not None, "nothing but an abort ends a lease before its ticket is written"
            waiting.set_exception(lease.error)

    def _on_lease_change(self) -> None:
        num_held = self.leases.num_held
        self._metrics.leases.set(num_held)
        self.host.board.set_num_leases(num_held)

    def _report(self, spec: SequenceSpec, prefilled: Prefilled, ticket: Ticket) -> None:
        num_tokens, worker = len(spec.token_ids), self._metrics.worker
        worker.prompt_tokens.inc(num_tokens)
        worker.output_tokens.inc()
        worker.cache_query_tokens.inc(num_tokens)
        worker.cache_hit_tokens.inc(prefilled.num_cached_tokens)
        worker.queue_seconds.observe(prefilled.queue_s)
        self._metrics.prefill_seconds.observe(prefilled.compute_s)
        data: dict[str, Any] = {
            "request_id": spec.request_id,
            "sample": spec.sample_index,
            "attempt": spec.attempt,
            "tokens": num_tokens,
            "cached_tokens": prefilled.num_cached_tokens,
            "queue_s": prefilled.queue_s,
            "prefill_s": prefilled.compute_s,
            "pages": len(ticket.page_ids),
            "bytes": ticket.num_bytes,
        }
        log.info("prefilled", extra=data)
