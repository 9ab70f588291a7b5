"""The router as a process: the service object that `process.run` runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

import grpc.aio
from headrace.v1 import generation_service_pb2_grpc
from headrace_core import rpc
from headrace_core.config import RouterSettings
from headrace_core.door import Call, Door, Guard, MethodLimits
from headrace_core.errors import HeadraceError, UnavailableError
from headrace_core.grpc_options import MAX_MESSAGE_BYTES
from headrace_core.http2 import call as http2_call
from headrace_core.hub import is_hub_name, name_of, with_folder
from headrace_core.identity import Identity, Role
from headrace_core.outside import call_outside
from headrace_core.slo import read_classes
from headrace_core.telemetry import with_role
from headrace_core.tracing.start import open_tracer

from headrace_router.callers.auth import front
from headrace_router.callers.caller import caller_of
from headrace_router.callers.keys import Keys
from headrace_router.face.grpc import GenerationServicer
from headrace_router.face.http.server import HttpServer
from headrace_router.face.openai.app import OpenAiApp
from headrace_router.metrics import Gauges, Objectives, RouterMetrics
from headrace_router.router import Router
from headrace_router.vllm_names import VllmNames

log = logging.getLogger(__name__)

_STOP_GRACE_S = 1.0
_GENERATE = "/headrace.v1.GenerationService/Generate"
_SMALL = MethodLimits(open_calls=1024, readers=4, message_bytes=32 << 20, max_message_bytes=64 << 10)
"""Of methods whose message is small: health, reflection, GetServerInfo."""
_MAX_PARTS = 16_384
"""Of one request: chat messages, entries of a bias, stop strings."""


def generate_limits(settings: RouterSettings) -> MethodLimits:
    """Return what requests may take: half of the memory for messages on their way, half for those of open requests."""
    half_bytes = settings.max_body_mib << 19
    return MethodLimits(
        open_calls=settings.max_open_requests,
        readers=half_bytes // MAX_MESSAGE_BYTES,
        message_bytes=half_bytes,
        max_parts=_MAX_PARTS,
        message_timeout_s=settings.message_timeout_s,
    )


class RouterService:
    """The router as a process; a `headrace_core.process.Service`. Event loop only."""

    def __init__(self, settings: RouterSettings) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        names = VllmNames(name_of(settings.model, settings.model_name)) if settings.metrics_compat == "vllm" else None
        self.metrics = RouterMetrics.create(Objectives.of(settings), names)
        self.registry = self.metrics.registry
        self.metrics_port = 0
        self.addresses: Mapping[str, str] = {}
        self._settings = settings
        self._tracer = open_tracer(settings.trace_sample, "router")
        self._router: Router | None = None
        self._following: asyncio.Task[None] | None = None
        self._identity = Identity.load(settings.tls, Role.ROUTER)
        self._tls = front(settings, self._identity)
        classes = read_classes(settings.slo_classes)
        self._keys = Keys(settings.keys_file, classes=classes) if settings.keys_file else None
        guards: list[Guard] = [self._keys.guard] if self._keys else []
        self._caller_of = self._keys.caller_of if self._keys else caller_of
        self._door = Door(
            _SMALL,
            methods={_GENERATE: generate_limits(settings)},
            guards=[*guards, self._arriving],
            caller_of=self._caller_of,
            on_refused=self._on_refused,
        )
        self._app: OpenAiApp | None = None
        self._http: HttpServer | None = None
        self._server = rpc.Server(
            ["headrace.v1.GenerationService"], door=self._door, tls=self._tls, shares_port=settings.processes > 1
        )

    async def start(self) -> str:
        """Load the tokenizer and serve. Workers are connected in the background; until then requests wait."""
        settings = self._settings
        if is_hub_name(settings.model):
            settings = await call_outside(with_folder, settings, False)
        if self._keys is not None and self._tls is None:
            log.warning("keys cross the network in clear text; set --tls, or --tls-cert and --tls-key")
        if self._tls is not None and self._identity is None:
            log.warning("workers are reached in clear text; set --tls")
        router = self._router = Router(
            settings,
            self.metrics,
            self._tracer,
            metrics_port=self.metrics_port,
            connect=self._connect,
            dial=self._dial,
            keys=self._keys,
        )
        self.registry.register(
            Gauges(
                lambda: (router.num_queued, router.num_running), router.worker_states, router.kv_used, router.circuits
            )
        )
        generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationServicer(router, self._door, self._keys), self._server.grpc
        )
        address = self._server.bind(settings.listen)
        router.start()
        await self._server.start()
        if settings.http_listen:
            await self._start_http(router, settings.http_listen)
        self._following = asyncio.create_task(router.fleet.run(), name="registry")
        self._following.add_done_callback(self._on_registry_end)
        await self._set_ready(True)
        return address

    async def drain(self) -> None:
        """Say NOT_SERVING, refuse new requests, wait for those under way."""
        await self._set_ready(False)
        if self._router is not None:
            await self._router.drain()

    async def stop(self) -> None:
        """End what is under way with UNAVAILABLE, tell the workers, leave them."""
        if self._router is not None:
            self._router.fail_all(UnavailableError("DRAINING", "the router stops"))
        if self._http is not None:
            await self._http.stop(_STOP_GRACE_S)
        await self._server.stop(_STOP_GRACE_S)
        if self._router is not None:
            await self._router.shut_down()
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._tracer.close()

    async def _start_http(self, router: Router, listen: str) -> None:
        metrics = with_role(self.registry, "router")
        self._app = OpenAiApp(router, self._door, self._caller_of, metrics, keys=self._keys)
        self._http = HttpServer(self._app, tls=self._tls, shares_port=self._settings.processes > 1)
        self.addresses = {"http_address": await self._http.start(listen)}

    async def _set_ready(self, is_ready: bool) -> None:
        await self._server.set_ready(is_ready)
        if self._app is not None:
            self._app.is_ready = is_ready
        if self._http is not None and not is_ready:
            self._http.drain()

    def _connect(self, address: str) -> grpc.aio.Channel:
        return rpc.channel(address, tls=self._identity and self._identity.to_worker())

    async def _dial(self, address: str, method: str, on_message: http2_call.OnMessage) -> http2_call.Call:
        tls = self._identity.call_worker() if self._identity else None
        return await http2_call.open_call(address, method, on_message, tls=tls)

    def _arriving(self, call: Call) -> Callable[[], None] | None:
        if call.method == _GENERATE and self._router is not None:
            if self._keys is not None:
                self._keys.take_request(call.context)
            return self._router.arriving(call)
        return None

    def _on_refused(self, method: str, error: HeadraceError | None) -> None:
        if method == _GENERATE and self._router is not None:
            self._router.count_refused(error)

    def _on_registry_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.failed.done():
            self.failed.set_exception(task.exception() or RuntimeError("the registry ended"))
