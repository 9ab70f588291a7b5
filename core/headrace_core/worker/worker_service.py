"""`WorkerService`: who a worker is and how loaded it is; the same for prefill and decode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from headrace.v1 import worker_service_pb2, worker_service_pb2_grpc

from headrace_core.batch.scheduler import Load
from headrace_core.worker.cache_board import CacheBoard

_DEFAULT_INTERVAL_S = 0.1
_LONGEST_SILENCE_S = 0.5
"""Half of what the wire allows, so that one late report makes nobody think that we are gone; the most that a caller may
ask for as well."""


class LoadBoard:
    """The worker's latest load report, and a wake-up for those who watch it. Event loop only."""

    def __init__(self) -> None:
        self.report = worker_service_pb2.WatchLoadResponse()
        self.cache = CacheBoard()
        self._changed = asyncio.Event()
        self._load = Load()
        self._num_leases = 0
        self._is_draining = False

    def set_load(self, load: Load) -> None:
        """Show what the scheduler holds."""
        self._load = load
        self.cache.take(load.cache_changes)
        self._publish(is_new=bool(load.cache_changes))

    def set_num_leases(self, num_leases: int) -> None:
        """Show how many sequences are held under a lease."""
        self._num_leases = num_leases
        self._publish()

    def set_draining(self) -> None:
        """Show that no new work is taken."""
        self._is_draining = True
        self._publish()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return at the next change, or after `timeout_s`."""
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return

    def _publish(self, *, is_new: bool = False) -> None:
        report = worker_service_pb2.WatchLoadResponse(
            num_free_pages=self._load.num_free_pages,
            most_free_pages=self._load.most_free_pages,
            num_running=self._load.num_running,
            num_waiting=self._load.num_waiting,
            num_waiting_tokens=self._load.num_waiting_tokens,
            num_leases=self._num_leases,
            is_draining=self._is_draining,
        )
        if is_new or report != self.report:
            self.report = report
            self._changed.set()
            self._changed = asyncio.Event()


class WorkerServicer(worker_service_pb2_grpc.WorkerServiceServicer):
    """Adapts `WorkerService` to a worker."""

    def __init__(
        self,
        info: Callable[[], worker_service_pb2.GetInfoResponse],
        board: LoadBoard,
        begin_drain: Callable[[], None],
    ) -> None:
        """`info` raises while the worker is starting."""
        self._info = info
        self._board = board
        self._begin_drain = begin_drain

    async def GetInfo(self, request: worker_service_pb2.GetInfoRequest, context: Any) -> Any:
        """See `worker_service.proto`."""
        return self._info()

    async def WatchLoad(
        self, request: worker_service_pb2.WatchLoadRequest, context: Any
    ) -> AsyncIterator[worker_service_pb2.WatchLoadResponse]:
        """See `worker_service.proto`."""
        interval_s = min(request.min_interval_ms / 1000 or _DEFAULT_INTERVAL_S, _LONGEST_SILENCE_S)
        board, position = self._board, None
        while True:
            report = board.report
            said = worker_service_pb2.WatchLoadResponse()
            said.CopyFrom(report)
            position = board.cache.put(said, position)
            yield said
            await asyncio.sleep(interval_s)
            if report is board.report:
                await self._board.wait_for_change(_LONGEST_SILENCE_S - interval_s)

    async def Drain(self, request: worker_service_pb2.DrainRequest, context: Any) -> Any:
        """See `worker_service.proto`."""
        self._begin_drain()
        return worker_service_pb2.DrainResponse()
