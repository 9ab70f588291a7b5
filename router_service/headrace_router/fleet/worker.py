"""One worker over one connection: who it is, its load, and what the router has promised of it (`promises`)."""

from __future__ import annotations

import asyncio

from headrace.v1 import worker_service_pb2
from headrace.v1.types_pb2 import WORKER_ROLE_BOTH, WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL
from headrace_core.errors import HeadraceError
from headrace_core.kv.layout import KvLayout

from headrace_router.fleet.answers import ROLE_NAMES
from headrace_router.fleet.session import LastTransfer, StepSession
from headrace_router.placement.breaker import Breaker, Circuit
from headrace_router.placement.capacity import WorkerView
from headrace_router.placement.promises import Promises, Report, WorkerSize


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
        self.promises = Promises(
            WorkerSize(
                address=address,
                page_size=layout.page_size,
                num_pages=info.num_pages,
                max_step_tokens=info.max_step_tokens,
                max_step_sequences=info.max_step_sequences,
                can_prefill=self.can_prefill,
                can_decode=self.can_decode,
                max_context_tokens=info.max_context_tokens,
                num_lanes=info.num_lanes or 1,
            )
        )
        self._is_held = False

    @property
    def is_busy(self) -> bool:
        """True while a sequence of this router uses the worker."""
        return len(self.promises) > 0

    @property
    def takes_work(self) -> bool:
        """True unless it refused work since its last report."""
        return not self._is_held

    def on_report(self, load: worker_service_pb2.WatchLoadResponse) -> None:
        """Take a load report."""
        self.load = load
        self._is_held = False
        self._take_cache(load)
        self.promises.on_report(
            Report(
                num_free_pages=load.num_free_pages,
                most_free_pages=load.most_free_pages or load.num_free_pages,
                num_sequences=load.num_running + load.num_waiting,
                num_waiting_tokens=load.num_waiting_tokens,
            )
        )
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

    def view(self, now_s: float) -> WorkerView:
        """Return what policies need to know."""
        return self.promises.view(
            is_probed=self.breaker.circuit(now_s) is Circuit.HALF_OPEN,
            step_s=self.session.step_s if self.load.num_running else 0.0,
            cached=self.cached,
        )

    def on_lost(self, error: HeadraceError) -> None:
        """The connection is gone: fail what runs here."""
        self._is_held = True
        self.session.fail(error)
        if not self.lost.done():
            self.lost.set_result(error)
