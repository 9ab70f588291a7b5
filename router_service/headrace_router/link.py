"""Keeps a connection to one address, for ever: a worker may come, go, and come back as another one.

    UNREACHABLE ── health answers ──► STARTING ── SERVING, GetInfo fits, first report, session open ──► READY
         ▲                               │ GetInfo does not fit                                        │  ▲
         │                               ▼                                              NOT_SERVING or │  │ both over
         ├──── tried again later ──── REFUSED                                       load.is_draining ▼  │
         └──────────────── any stream broke: its sequences fail over ──────────────────────────────── DRAINING
A reconnection makes a new `Worker`, even if the process is the same one: its session is gone, so its sequences are.
"""

from __future__ import annotations

import asyncio
import logging
import random
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.v1 import worker_service_pb2
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub
from headrace_core import rpc
from headrace_core.errors import HeadraceError, LayoutMismatchError, UnavailableError

from headrace_router.worker import Worker

if TYPE_CHECKING:
    from headrace.v1.worker_service_pb2_grpc import WorkerServiceAsyncStub

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
_REPORT_INTERVAL_MS = 50
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 1.0
_REFUSED_BACKOFF_S = 2.0


class LinkState(Enum):
    """Where a link stands; the values are `WorkerStatus.state`'s."""

    UNREACHABLE = "unreachable"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    REFUSED = "refused"


class Fleet(Protocol):
    """What a link asks of the registry."""

    def judge(self, link: Link, info: worker_service_pb2.GetInfoResponse) -> str:
        """Return why the worker can't join; empty if it can."""
        ...

    def on_change(self) -> None:
        """Called after every change of a link or a worker's load."""
        ...


class Link:
    """The connection to one address."""

    def __init__(self, address: str, fleet: Fleet) -> None:
        self.address = address
        self.state = LinkState.UNREACHABLE
        self.detail = "not tried yet"
        self.worker: Worker | None = None
        self.info: worker_service_pb2.GetInfoResponse | None = None
        self._is_listed = True
        self._fleet = fleet
        self._is_serving = False

    @property
    def takes_work(self) -> bool:
        """True if new sequences may go there now."""
        return self.is_listed and self.state is LinkState.READY and self.worker is not None and self.worker.takes_work

    @property
    def is_listed(self) -> bool:
        """True while discovery names the address."""
        return self._is_listed

    def set_listed(self, is_listed: bool) -> None:
        """Take what discovery says; a worker that is no longer listed gets nothing new."""
        if is_listed != self._is_listed:
            self._is_listed = is_listed
            if self.worker is not None:
                self._settle()

    async def run(self) -> None:
        """Connect, watch, reconnect; until cancelled."""
        channel = rpc.channel(self.address)
        backoff_s = _FIRST_BACKOFF_S
        try:
            while True:
                error = await self._connection(channel)
                if self.worker is not None:
                    backoff_s = _FIRST_BACKOFF_S
                self._lose(error)
                is_refused = self.state is LinkState.REFUSED
                await asyncio.sleep((_REFUSED_BACKOFF_S if is_refused else backoff_s) * random.uniform(0.8, 1.2))
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
        finally:
            log.info("left a worker", extra={"address": self.address})
            if self.worker is not None:
                self.worker.on_lost(UnavailableError("WORKER_LOST", f"{self.address} was removed"))
            await channel.close()

    async def _connection(self, channel: grpc.aio.Channel) -> HeadraceError:
        """Live through one connection and return why it ended."""
        try:
            async with asyncio.TaskGroup() as group:
                await self._watch_health(channel, group)
        except ExceptionGroup as errors:
            error = _first(errors)
            if isinstance(error, HeadraceError):
                return error
            if isinstance(error, grpc.aio.AioRpcError):
                return rpc.raised_from(error)
            if isinstance(error, TimeoutError):
                return UnavailableError("WORKER_LOST", f"no answer in {_CONNECT_TIMEOUT_S:.0f} s")
            raise
        return UnavailableError("WORKER_LOST", "the worker closed its health stream")

    async def _watch_health(self, channel: grpc.aio.Channel, group: asyncio.TaskGroup) -> None:
        health: Any = health_pb2_grpc.HealthStub(channel)
        async for response in health.Watch(health_pb2.HealthCheckRequest(service="")):
            self._is_serving = response.status == health_pb2.HealthCheckResponse.SERVING
            if self._is_serving and self.worker is None:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    self.worker = await self._join(channel, group)
            self._settle()
        raise UnavailableError("WORKER_LOST", "the worker closed its health stream")

    async def _join(self, channel: grpc.aio.Channel, group: asyncio.TaskGroup) -> Worker:
        """Ask who it is and open its streams.

        Raises:
            LayoutMismatchError: it can't join this fleet.
        """
        stub = WorkerServiceStub(channel)
        self.info = await stub.GetInfo(worker_service_pb2.GetInfoRequest(), timeout=_CONNECT_TIMEOUT_S)
        refusal = self._fleet.judge(self, self.info)
        if refusal:
            raise LayoutMismatchError("REFUSED", refusal)
        worker = Worker(self.address, self.info, channel)
        group.create_task(self._watch_load(stub, worker))
        await worker.reported.wait()
        if worker.can_decode:
            group.create_task(worker.session.run(worker.decode))
            await worker.session.opened.wait()
        return worker

    async def _watch_load(self, stub: WorkerServiceAsyncStub, worker: Worker) -> None:
        request = worker_service_pb2.WatchLoadRequest(min_interval_ms=_REPORT_INTERVAL_MS)
        async for load in stub.WatchLoad(request):
            worker.on_report(load)
            if self.worker is worker:
                self._settle()
        raise UnavailableError("WORKER_LOST", "the worker ended its load reports")

    def _settle(self) -> None:
        """Say what health and load amount to."""
        if self.worker is None:
            self._set(LinkState.STARTING, "loading")
        elif not self._is_listed:
            self._set(LinkState.DRAINING, "no longer listed; finishes what it has")
        elif self._is_serving and not self.worker.load.is_draining:
            self._set(LinkState.READY, "")
        else:
            self._set(LinkState.DRAINING, "finishes what it has and takes nothing new")
        self._fleet.on_change()

    def _lose(self, error: HeadraceError) -> None:
        worker, self.worker = self.worker, None
        if isinstance(error, LayoutMismatchError):
            self._set(LinkState.REFUSED, str(error))
        else:
            self._set(LinkState.UNREACHABLE, str(error))
        if worker is not None:
            worker.on_lost(UnavailableError("WORKER_LOST", f"{self.address}: {error}"))
        self._fleet.on_change()

    def _set(self, state: LinkState, detail: str) -> None:
        if state is not self.state:
            level = logging.WARNING if state in (LinkState.UNREACHABLE, LinkState.REFUSED) else logging.INFO
            log.log(level, "worker is %s", state.value, extra={"address": self.address, "detail": detail})
        self.state, self.detail = state, detail


def _first(error: Exception) -> Exception:
    """Return one error of a group that may hold groups."""
    return _first(error.exceptions[0]) if isinstance(error, ExceptionGroup) else error
