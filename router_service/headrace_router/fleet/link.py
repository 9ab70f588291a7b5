"""Keeps a connection to one address, for ever: a worker may come, go, and come back as another one.

    UNREACHABLE ── health answers ──► STARTING ── SERVING, GetInfo fits, first report, session open ──► READY
         ▲                               │ GetInfo does not fit                                        │  ▲
         │                               ▼                                              NOT_SERVING or │  │ both over
         ├──── tried again later ──── REFUSED ◄── an answer that can't be ──┐       load.is_draining ▼  │
         └── any stream broke, or no sign of life: its sequences fail over ─┴──────────────────────── DRAINING
    READY ── no load reports ──► SUSPECT ── a load report ──► READY; see `pulse.py` for how it is lost from there
A reconnection makes a new `Worker`, even if the process is the same one: its session is gone, so its sequences are.

Whatever is wrong with an address or with what its worker says ends in `run`, as that link's state: a link costs nobody
but its worker.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.v1 import worker_service_pb2
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub
from headrace_core import rpc
from headrace_core.errors import (
    HeadraceError,
    LayoutMismatchError,
    PermissionDeniedError,
    ProtocolError,
    UnauthenticatedError,
    UnavailableError,
)
from headrace_core.http2.call import Dial, open_call
from headrace_core.kv.layout import KvLayout
from headrace_core.pace import Pace

from headrace_router.fleet.answers import check_health, check_info, check_load
from headrace_router.fleet.pulse import Pulse
from headrace_router.fleet.worker import Worker
from headrace_router.placement.breaker import Breaker

if TYPE_CHECKING:
    from headrace.v1.worker_service_pb2_grpc import WorkerServiceAsyncStub

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
_REPORT_INTERVAL_MS = 50
_MOST_REPORTS_PER_S = 40.0
"""Of load and of health. Load is asked for 20 times a second at most, health comes when it changes."""
_MOST_REPORTS_AT_ONCE = 200.0
"""What an honest worker says in 10 s, for which the network or this process may have stood still."""
_FIRST_PAUSE_S = 0.1
_SHORT_PAUSE_S = 1.0
_LONG_PAUSE_S = 30.0
_AWAY_SHARE = 0.1
_REFUSED_PAUSE_S = 2.0
_MOST_DETAIL_CHARS = 500
_REFUSALS = (LayoutMismatchError, ProtocolError, PermissionDeniedError, UnauthenticatedError)
"""Errors by which one of the two does not want the other."""


class LinkState(Enum):
    """Where a link stands; the values are `WorkerStatus.state`'s."""

    UNREACHABLE = "unreachable"
    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    REFUSED = "refused"


class Backoff:
    """How long a link waits before it tries again: twice as long each time, at most a tenth of the time it is away.

    So a worker that comes back is noticed soon, and an address where nobody is costs little.
    """

    def __init__(self) -> None:
        self._pause_s = _FIRST_PAUSE_S
        self._away_since_s = 0.0
        self._is_away = False

    def on_joined(self) -> None:
        """The worker was there."""
        self._is_away = False

    def pause_s(self, now_s: float) -> float:
        """Return the next pause."""
        if not self._is_away:
            self._is_away = True
            self._away_since_s = now_s
            self._pause_s = _FIRST_PAUSE_S
            return self._pause_s
        most_s = max(_SHORT_PAUSE_S, min(_AWAY_SHARE * (now_s - self._away_since_s), _LONG_PAUSE_S))
        self._pause_s = min(2 * self._pause_s, most_s)
        return self._pause_s


class Fleet(Protocol):
    """What a link asks of the registry."""

    @property
    def router_id(self) -> int:
        """The random identity of this router process."""
        ...

    def judge(self, link: Link, info: worker_service_pb2.GetInfoResponse, layout: KvLayout) -> str:
        """Return why the worker can't join; empty if it can."""
        ...

    def on_change(self) -> None:
        """Called after every change of a link or a worker's load."""
        ...

    def on_state(self) -> None:
        """Called after a link entered another state; `on_change` follows."""
        ...


class Link:
    """The connection to one address."""

    def __init__(self, address: str, fleet: Fleet, connect: rpc.Connect = rpc.channel, dial: Dial = open_call) -> None:
        self.address = address
        self.state = LinkState.UNREACHABLE
        self.detail = "not tried yet"
        self.worker: Worker | None = None
        self.info: worker_service_pb2.GetInfoResponse | None = None
        """Who it said it is, last; None until it gave an answer that can be."""
        self.breaker = Breaker()
        """Of whoever is at the address."""
        self._made: list[Worker] = []
        """Those of this channel, lost ones included, that sequences may still use."""
        self._is_listed = True
        self._is_tried = False
        self._fleet = fleet
        self._connect = connect
        self._dial = dial
        self._is_serving = False
        self._pulse: Pulse | None = None

    @property
    def takes_work(self) -> bool:
        """True if new sequences may go there now."""
        return self.state is LinkState.READY and self.worker is not None and self.worker.takes_work

    @property
    def is_ready(self) -> bool:
        """True while the worker is part of the fleet that is there: connected, listed, not draining."""
        return self.state in (LinkState.READY, LinkState.SUSPECT)

    @property
    def is_busy(self) -> bool:
        """True while a sequence uses the channel, be it one that is just being told that its worker is lost."""
        return any(worker.is_busy for worker in self._made)

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
        channel: grpc.aio.Channel | None = None
        backoff = Backoff()
        try:
            while True:
                try:
                    channel = channel or self._connect(self.address)
                    async with asyncio.TaskGroup() as group:
                        await self._watch_health(channel, group)
                except Exception as error:  # noqa: BLE001 - the boundary: nothing of one worker's may reach another
                    cause = self._cause(error)
                else:
                    cause = UnavailableError("WORKER_LOST", "the worker closed its health stream")
                if _is_cancelled():
                    # A group that fails while it is cancelled raises the failure, and the cancellation is gone.
                    raise asyncio.CancelledError
                if self.worker is not None:
                    backoff.on_joined()
                self._lose(cause)
                pause_s = backoff.pause_s(time.monotonic())
                if self.state is LinkState.REFUSED:
                    pause_s = _REFUSED_PAUSE_S
                elif pause_s > _SHORT_PAUSE_S and channel is not None and not self.is_busy:
                    await channel.close()  # gRPC itself would go on trying, more often than we do
                    channel = None
                await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
        finally:
            log.info("left a worker", extra={"address": self.address})
            worker, self.worker = self.worker, None
            if worker is not None:
                worker.on_lost(UnavailableError("WORKER_LOST", f"{self.address} was removed"))
            if channel is not None:
                await channel.close()

    def _cause(self, error: Exception) -> HeadraceError:
        """Return why a connection ended, whatever it raised."""
        error = _first(error)
        if isinstance(error, HeadraceError):
            return error
        if isinstance(error, grpc.aio.AioRpcError):
            return rpc.raised_from(error)
        if isinstance(error, TimeoutError):
            return UnavailableError("WORKER_LOST", f"no answer in {_CONNECT_TIMEOUT_S:.0f} s")
        log.error("unhandled error in a link", extra={"address": self.address}, exc_info=error)
        return HeadraceError("BUG", f"internal error: {type(error).__name__}: {error}")

    async def _watch_health(self, channel: grpc.aio.Channel, group: asyncio.TaskGroup) -> None:
        health: Any = health_pb2_grpc.HealthStub(channel)
        call = health.Watch(health_pb2.HealthCheckRequest(service=""))
        pace = Pace("health reports", per_s=_MOST_REPORTS_PER_S, burst=_MOST_REPORTS_AT_ONCE)
        try:
            async for response in call:
                pace.take()
                self._is_serving = check_health(rpc.answered(response))
                if self._is_serving and self.worker is None:
                    async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                        self.worker = await self._join(channel, group)
                    self._pulse = Pulse(health, self._settle)
                    group.create_task(self._pulse.run())
                self._settle()
        finally:
            call.cancel()
        raise UnavailableError("WORKER_LOST", "the worker closed its health stream")

    async def _join(self, channel: grpc.aio.Channel, group: asyncio.TaskGroup) -> Worker:
        """Ask who it is and open its streams.

        Raises:
            ProtocolError: what it says can't be.
            LayoutMismatchError: it can't join this fleet.
        """
        stub = WorkerServiceStub(channel)
        info = rpc.answered(await stub.GetInfo(worker_service_pb2.GetInfoRequest(), timeout=_CONNECT_TIMEOUT_S))
        layout = check_info(info)
        self.info = info
        self._judge(info, layout)
        worker = Worker(self.address, info, layout, self._fleet.router_id, self.breaker)
        group.create_task(self._watch_load(stub, worker))
        await worker.reported.wait()
        if worker.can_decode:
            group.create_task(worker.session.run(self.address, self._dial))
            await worker.session.opened.wait()
        self._judge(info, layout)  # again: another may have joined meanwhile, and decided what the fleet serves
        self._made = [*(made for made in self._made if made.is_busy), worker]
        return worker

    def _judge(self, info: worker_service_pb2.GetInfoResponse, layout: KvLayout) -> None:
        refusal = self._fleet.judge(self, info, layout)
        if refusal:
            raise LayoutMismatchError("REFUSED", refusal)

    async def _watch_load(self, stub: WorkerServiceAsyncStub, worker: Worker) -> None:
        call = stub.WatchLoad(worker_service_pb2.WatchLoadRequest(min_interval_ms=_REPORT_INTERVAL_MS))
        pace = Pace("load reports", per_s=_MOST_REPORTS_PER_S, burst=_MOST_REPORTS_AT_ONCE)
        try:
            async for response in call:
                pace.take()
                load = rpc.answered(response)
                check_load(load, worker.info)
                worker.on_report(load)
                if self._pulse is not None:
                    self._pulse.heard()
                if self.worker is worker:
                    self._settle()
        finally:
            call.cancel()
        raise UnavailableError("WORKER_LOST", "the worker ended its load reports")

    def _settle(self) -> None:
        """Say what health and load amount to."""
        if self.worker is not None and self.worker.load.is_draining:
            self.worker.session.leave()
        if self.worker is None:
            self._set(LinkState.STARTING, "loading")
        elif not self._is_listed:
            self._set(LinkState.DRAINING, "no longer listed; finishes what it has")
        elif self._is_serving and not self.worker.load.is_draining:
            if self._pulse is not None and self._pulse.is_suspect:
                self._set(LinkState.SUSPECT, "says nothing; gets nothing new until it does")
            else:
                self._set(LinkState.READY, "")
        else:
            self._set(LinkState.DRAINING, "hands over or finishes what it has and takes nothing new")
        self._fleet.on_change()

    def _lose(self, error: HeadraceError) -> None:
        """Leave the connection behind: its sequences fail, and so does what the fleet counted on it for."""
        worker, self.worker, self._pulse = self.worker, None, None
        # One line, whatever a worker puts into its words.
        detail = " ".join(str(error).split())[:_MOST_DETAIL_CHARS]
        is_refused = isinstance(error, _REFUSALS) or error.reason == "BUG"
        self._set(LinkState.REFUSED if is_refused else LinkState.UNREACHABLE, detail)
        if worker is not None:
            told = f"{self.address}: {detail}"
            is_nonsense = isinstance(error, ProtocolError)
            worker.on_lost(ProtocolError(error.reason, told) if is_nonsense else UnavailableError("WORKER_LOST", told))
        self._fleet.on_change()

    def _set(self, state: LinkState, detail: str) -> None:
        is_new = state is not self.state
        is_worse = state in (LinkState.UNREACHABLE, LinkState.REFUSED, LinkState.SUSPECT)
        # An address that never answers is told once; one that is refused for another reason, again.
        if is_new or not self._is_tried or (state is LinkState.REFUSED and detail != self.detail):
            level = logging.WARNING if is_worse else logging.INFO
            log.log(level, "worker is %s", state.value, extra={"address": self.address, "detail": detail})
        self._is_tried = True
        self.state, self.detail = state, detail
        if is_new:
            self._fleet.on_state()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _first(error: Exception) -> Exception:
    """Return one error of a group that may hold groups."""
    return _first(error.exceptions[0]) if isinstance(error, ExceptionGroup) else error
