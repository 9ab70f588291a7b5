"""The frame of a worker process: gRPC server, model, engine thread, readiness. Prefill and decode fill it.

STARTING ──model loaded──► READY ──drain──► DRAINING ──► STOPPED
    any state ──engine thread died──► FAILED (health NOT_SERVING; the process exits)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Generic, TypeVar

import grpc.aio
from headrace.v1 import types_pb2, worker_service_pb2, worker_service_pb2_grpc
from headrace_kernels import backend

from headrace_core import __version__
from headrace_core.authority import ServerTls
from headrace_core.batch.scheduler import Scheduler
from headrace_core.batch.step import LayerWatch
from headrace_core.config import WorkerSettings
from headrace_core.door import LONG_CALLS, Door
from headrace_core.engine.balance import Balance, Moved, Seen
from headrace_core.engine.engine import Beat, Engine, News
from headrace_core.engine.executor import Executor
from headrace_core.engine.leader import BEAT_S, GroupModel, Leader
from headrace_core.errors import UnavailableError
from headrace_core.identity import Identity, Role
from headrace_core.peers import Peers
from headrace_core.rpc import Server, own_channel
from headrace_core.tracing.start import open_tracer
from headrace_core.wire import encode_layout
from headrace_core.worker.daemon import on_daemon
from headrace_core.worker.lent_threads import LentThreads
from headrace_core.worker.loading import LoadedModel
from headrace_core.worker.metrics import WorkerMetrics
from headrace_core.worker.worker_service import LoadBoard, WorkerServicer

log = logging.getLogger(__name__)

_STOP_GRACE_S = 0.5
_OWN_SIGNAL_S = 0.5
WORKER_SERVICE = "headrace.v1.WorkerService"

Loader = Callable[[WorkerSettings], LoadedModel]


class HostState(Enum):
    """Where the process is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


S = TypeVar("S", bound=Scheduler[Any])


class WorkerHost(Generic[S]):
    """Event loop only. `failed` resolves when the engine thread dies."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        role: types_pb2.WorkerRole.ValueType,
        services: Sequence[str],
        transports: Sequence[str],
        metrics: WorkerMetrics,
    ) -> None:
        self._settings = settings
        self.tracer = open_tracer(
            settings.trace_sample, types_pb2.WorkerRole.Name(role).removeprefix("WORKER_ROLE_").lower()
        )
        self._role: types_pb2.WorkerRole.ValueType = role
        self._transports = transports
        self._metrics = metrics
        own_role = Role.PREFILL if role == types_pb2.WORKER_ROLE_PREFILL else Role.DECODE
        self._identity = Identity.load(settings.tls, own_role)
        self._peers = Peers(settings.peers, settings.peers_file, has_tls=settings.tls is not None)
        self.server = Server(
            [*services, WORKER_SERVICE],
            door=Door(methods=LONG_CALLS, on_refused=metrics.count_refused),
            tls=ServerTls(self._identity, own_role) if self._identity else None,
        )
        self.board = LoadBoard()
        self.incarnation = secrets.randbits(64)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.state = HostState.STARTING
        self.address = ""
        self.metrics_port = 0
        self._model: LoadedModel | None = None
        self._engine: Engine[S] | None = None
        self._leader: Leader | None = None
        self._lent: LentThreads | None = None
        self._draining: asyncio.Task[None] | None = None
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(
            WorkerServicer(self.info, self.board, self.begin_drain), self.server.grpc
        )

    @property
    def model(self) -> LoadedModel:
        """The model.

        Raises:
            UnavailableError: STARTING, it is not loaded yet.
        """
        if self._model is None:
            raise UnavailableError("STARTING", "the worker is loading its model; try again")
        return self._model

    @property
    def engine(self) -> Engine[S]:
        """The engine; there once the model is."""
        assert self._engine is not None, "the engine starts with the model"
        return self._engine

    @property
    def endpoint(self) -> str:
        """Address at which others reach this worker."""
        if self._settings.advertise:
            return self._settings.advertise
        host, _, port = self.address.rpartition(":")
        return f"{socket.gethostname()}:{port}" if host in ("0.0.0.0", "[::]", "::") else self.address

    async def connect(self, endpoint: str) -> grpc.aio.Channel:
        """Return a channel to another worker; see `connections.Connect`.

        Raises:
            PermissionDeniedError: NOT_A_PEER.
        """
        address = await self._peers.find(endpoint)
        return own_channel(address, tls=self._identity and self._identity.to_worker())

    async def bind(self) -> str:
        """Serve with health NOT_SERVING; return the address. Add servicers before.

        Raises:
            HeadraceError: BIND.
        """
        self.address = self.server.bind(self._settings.listen)
        self._peers.announce(self.address)
        await self.server.start()
        return self.address

    async def load(self, loader: Loader) -> LoadedModel:
        """Load the model on another thread, while RPCs are answered.

        Raises:
            CheckpointError: it can't be served.
        """
        return await on_daemon(lambda: loader(self._settings), "loading")

    async def go(
        self,
        model: LoadedModel,
        scheduler: S,
        on_news: Callable[[News[Any]], None],
        *,
        watch: LayerWatch | None = None,
    ) -> None:
        """Start the engine and take work; `on_news` is called on the event loop, `watch` on the engine thread."""

        def deliver(news: News[Any]) -> None:
            self.board.set_load(news.load)
            self._metrics.observe_load(news.load)
            if news.report:
                self._metrics.observe_step(news.report)
            on_news(news)

        timing_period = self._settings.roofline_every_steps if model.prediction else 0
        if model.prediction and timing_period:
            self._metrics.show_operations(model.prediction)
        lent = self._lent = self._lent_threads(model)
        network = _of_group(model) if model.group else model.model
        executor = Executor(
            network,
            model.cache,
            timing_period=timing_period,
            num_threads=lent.take if lent else None,
            grammars=model.grammars,
            mtp=model.mtp,
        )
        leader = self._leader = self._lead(model, executor, scheduler)
        self._model = model
        engine = self._engine = Engine(
            scheduler,
            leader.step if leader else executor.step,
            deliver=deliver,
            on_fatal=self._on_fatal,
            watch=watch,
            rest=lent.rest if lent else None,
            beat=Beat(leader.beat, BEAT_S) if leader else None,
        )
        if leader and model.group:
            model.group.pages.lead(leader, lambda function: engine.submit(lambda _: function()))
        self._engine.start()
        self._engine.submit(lambda _: None)  # makes the first load report
        self.state = HostState.READY
        await self.server.set_ready(True)

    def require_ready(self) -> None:
        """Refuse new work unless ready.

        Raises:
            UnavailableError: STARTING, DRAINING.
        """
        if self.state is HostState.STARTING:
            raise UnavailableError("STARTING", "the worker is loading its model; try again")
        if self.state is not HostState.READY:
            raise UnavailableError("DRAINING", "the worker takes no new work; try another")

    def begin_drain(self) -> None:
        """Refuse new work from now on. Idempotent.

        Raises:
            UnavailableError: STARTING, there is nothing to drain yet.
        """
        if self.state is HostState.STARTING:
            raise UnavailableError("STARTING", "the worker is loading its model; stop the process instead")
        if self.state is HostState.READY:
            self.state = HostState.DRAINING
            self.board.set_draining()
            self._draining = asyncio.ensure_future(self.server.set_ready(False))

    async def stop(self) -> None:
        """Stop answering and end the engine thread."""
        self.state = HostState.STOPPED
        await self.server.set_ready(False)
        await self.server.stop(_STOP_GRACE_S)
        if self._draining:
            await self._draining
        if self._engine:
            await self._engine.stop()
        if self._leader:
            self._let_go()
            await asyncio.to_thread(self._leader.close)
        if self._lent:
            self._lent.close()
        await self._peers.close()
        self._metrics.close()
        await self.tracer.close()

    def info(self) -> worker_service_pb2.GetInfoResponse:
        """Return who this worker is.

        Raises:
            UnavailableError: STARTING.
        """
        model = self.model
        return worker_service_pb2.GetInfoResponse(
            role=self._role,
            incarnation=self.incarnation,
            model_name=model.name,
            model_fingerprint=model.fingerprint,
            layout=encode_layout(model.layout),
            num_pages=model.num_pages,
            num_lanes=model.num_lanes,
            max_context_tokens=model.limits.max_context_tokens,
            max_step_tokens=self._settings.max_step_tokens,
            max_step_sequences=self._settings.max_step_sequences,
            vocab_size=model.limits.vocab_size,
            eos_token_ids=model.limits.eos_token_ids,
            transports=self._transports,
            version=__version__,
            metrics_port=self.metrics_port,
            has_grammars=not model.limits.grammar_problem,
        )

    def _lent_threads(self, model: LoadedModel) -> LentThreads | None:
        """Return what the worker has of the others' threads; None where it keeps to its own.

        Plain torch may sum in another order on another number of threads, so that a seed would not give its tokens; and
        the ranks of a group wait for the slowest, which more threads for one of them would not make faster.
        """
        folder = self._settings.lend_threads
        if folder is None or model.group or backend(model.cache.layers[0]) != "cpu":
            return None
        return LentThreads(folder, self._settings.threads)

    def _lead(self, model: LoadedModel, executor: Executor, scheduler: S) -> Leader | None:
        """Return what leads the other ranks; None: there are none."""
        self._metrics.ranks.set(model.group.ranks.size if model.group else 1)
        if model.group is None:
            return None
        loop = asyncio.get_running_loop()

        def on_leave() -> None:
            # A signal of its own, if all ranks were given one, comes first: a second would end it at once.
            loop.call_soon_threadsafe(loop.call_later, _OWN_SIGNAL_S, self._leave)

        def on_news(news: Seen | Moved) -> None:
            loop.call_soon_threadsafe(self._metrics.observe_balance, news)

        group, experts = model.group, model.group.experts
        balance = Balance(group.ranks, experts.own, experts.rule, on_news=on_news) if experts else None
        return Leader(
            group.ranks, executor.step, group.part, scheduler.running_keys, on_leave=on_leave, balance=balance
        )

    def _let_go(self) -> None:
        """Let nobody wait for the engine, which is over."""
        if self._model and self._model.group:
            self._model.group.pages.close()

    def _leave(self) -> None:
        if self.state is HostState.READY:
            log.info("another rank was told to leave, so all do")
            os.kill(os.getpid(), signal.SIGTERM)

    def _on_fatal(self, error: BaseException) -> None:
        self.state = HostState.FAILED
        self._let_go()
        self._draining = asyncio.ensure_future(self.server.set_ready(False))
        with contextlib.suppress(asyncio.InvalidStateError):
            self.failed.set_exception(error)


def _of_group(model: LoadedModel) -> GroupModel:
    """Return the model of rank 0 of a group."""
    assert model.group is not None
    experts = model.group.experts
    return GroupModel(model.model, model.group.ranks, experts.own.clock if experts else None)
