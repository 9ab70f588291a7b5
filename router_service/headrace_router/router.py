"""The router without its gRPC face: requests in, requests under way, what is known of the fleet."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from headrace.v1 import generation_service_pb2
from headrace.v1.types_pb2 import WORKER_ROLE_UNSPECIFIED
from headrace_core import __version__
from headrace_core.config import RouterSettings
from headrace_core.discovery import Discovery
from headrace_core.door import Call
from headrace_core.endable import EndableWait
from headrace_core.errors import HeadraceError, OverloadedError, UnavailableError
from headrace_core.families.generation_config import read_sampling_defaults
from headrace_core.http2.call import Dial, open_call
from headrace_core.hub import name_of
from headrace_core.request import MOST_TIMEOUT_S, SamplingParams
from headrace_core.rpc import Connect, channel
from headrace_core.shares import Caller
from headrace_core.slo import read_classes
from headrace_core.tracing.span import Tracer
from headrace_core.wire import encode_sampling

from headrace_router.callers.keys import Keys
from headrace_router.fleet.answers import ROLE_NAMES
from headrace_router.fleet.link import Link
from headrace_router.fleet.registry import FleetModel, Registry
from headrace_router.metrics import RouterMetrics
from headrace_router.placement.breaker import Circuit
from headrace_router.placement.preferences import PREFERENCES
from headrace_router.requests.admission import Admission, RequestSpec
from headrace_router.requests.dispatch import Dispatcher
from headrace_router.requests.flow import Flow
from headrace_router.requests.running import RunningRequest, deadline_error, outcome_of, outcome_of_leaving
from headrace_router.requests.tracing import Metadata, begin_request
from headrace_router.requests.waiting import Seat, WaitingRoom
from headrace_router.text.prompts import Prompts
from headrace_router.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MOST_PROMPT_LOGPROBS = 1 << 22
"""Of all prompts of requests under way: 32 MB, and 120 where answers are collected as JSON."""


class Router:
    """Event loop only."""

    def __init__(
        self,
        settings: RouterSettings,
        metrics: RouterMetrics,
        tracer: Tracer,
        *,
        metrics_port: int = 0,
        connect: Connect = channel,
        dial: Dial = open_call,
        keys: Keys | None = None,
    ) -> None:
        """Load the tokenizer; `connect` and `dial` reach workers, `keys` say how many tokens a caller may use.

        Raises:
            CheckpointError: the model folder can't be used.
            StartupError: BAD_ADDRESS, of a worker.
        """
        self.fleet = Registry(
            Discovery(settings.workers, settings.workers_file),
            dns_refresh_s=settings.dns_refresh_s,
            connect=connect,
            dial=dial,
        )
        self._settings = settings
        self._tracer = tracer
        self._metrics_port = metrics_port
        self._metrics = metrics
        self._keys = keys
        self.model_name = name_of(settings.model, settings.model_name)
        """Of the one model that is served."""
        self._tokenizer = Tokenizer(settings.model)
        dispatcher = Dispatcher(
            self.fleet,
            no_workers_timeout_s=settings.no_workers_timeout_s,
            preference=PREFERENCES[settings.placement],
        )
        self._flow = Flow(
            dispatcher,
            metrics,
            max_attempts=settings.max_attempts,
            local_below=settings.local_below_tokens,
            predicts_local=settings.predict_local,
        )
        self._prompts = Prompts(
            self._tokenizer, max_bytes=settings.max_prompt_bytes, plain_user_text=settings.plain_user_text
        )
        has_defaults = settings.generation_config == "auto"
        self._sampling = read_sampling_defaults(settings.model) if has_defaults else SamplingParams()
        self._admission = Admission(
            self._prompts,
            model_name=self.model_name,
            specials=self._tokenizer.specials,
            sampling=self._sampling,
            classes=read_classes(settings.slo_classes),
        )
        self._waiting = WaitingRoom(settings.max_queued_requests, settings.max_queued_tokens)
        self._running: dict[str, RunningRequest] = {}
        self._num_entering = 0
        self._num_prompt_logprobs = 0
        """Of the requests under way."""
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_queued(self) -> int:
        """Requests of which no sample has a worker yet, or whose message is on its way."""
        return self._waiting.num_taken

    @property
    def num_running(self) -> int:
        """Requests under way, queued ones included."""
        return self._num_entering + len(self._running)

    def start(self) -> None:
        """Begin what goes on in the background; `shut_down` must follow."""
        self._prompts.start()

    async def drain(self) -> None:
        """Refuse new requests and wait until none is under way."""
        self._is_draining = True
        await self._idle.wait()

    def fail_all(self, error: HeadraceError) -> None:
        """Refuse new requests and end with `error` those under way, also if they are arriving or being checked."""
        self._is_draining = True
        for running in list(self._running.values()):
            running.fail(error)
        self._waiting.end_all(error)

    async def shut_down(self) -> None:
        """End threads and processes."""
        await self._prompts.close()

    def arriving(self, call: Call) -> Callable[[], None]:
        """Keep a place in the queue for a request whose message is on its way; `open` gives it another at once.

        Returns what gives the place up.

        Raises:
            UnavailableError: DRAINING.
            OverloadedError: QUEUE_FULL.
        """
        self._check_open()
        return self._waiting.take(call.caller, is_arriving=True, evict=call.refuse, end=call.end).leave

    async def open(
        self,
        message: generation_service_pb2.GenerateRequest,
        caller: Caller,
        remaining_s: float | None,
        *,
        metadata: Metadata = (),
        on_failed: Callable[[], None],
        shown: Sequence[str] = (),
    ) -> RunningRequest:
        """Check a request and start it; `close` must follow.

        Args:
            message: the client's.
            caller: who sent it.
            remaining_s: until the client's deadline; None if it has none.
            metadata: of the call; it may name a trace.
            on_failed: called when the request has failed and is closed, though its client may not know yet.
            shown: special tokens that its text shows, if the model has them.

        Raises:
            HeadraceError: it is refused.
        """
        self._num_entering += 1
        self._idle.clear()
        arrival_s = time.monotonic()
        allowed_s = self._settings.request_timeout_s if remaining_s is None else remaining_s
        deadline_s = arrival_s + min(allowed_s, MOST_TIMEOUT_S)
        seat: Seat | None = None
        span = begin_request(self._tracer, message, metadata, model=self.model_name, arrival_s=arrival_s)
        try:
            self._check_open()
            wait = EndableWait()
            seat = self._waiting.take(caller, evict=wait.end)
            spec = await self._admit(message, caller, wait, arrival_s=arrival_s, deadline_s=deadline_s)
            if shown and (shown_ids := self._tokenizer.special_ids(shown)):
                spec = replace(spec, shown_ids=shown_ids)
            seat.weigh(len(spec.prompt_ids))
            if self._num_prompt_logprobs + spec.num_prompt_logprobs > MOST_PROMPT_LOGPROBS:
                raise OverloadedError(
                    "QUEUE_FULL", "log-probabilities of so many prompts' tokens are under way already; try again later"
                )

            def close(failed: RunningRequest) -> None:
                self.close(failed)
                on_failed()

            on_used = self._keys.take_tokens(caller, spec.most_tokens) if self._keys else None
            running = RunningRequest(
                spec, self._flow, self._tokenizer, self._metrics, seat, on_failed=close, on_used=on_used, span=span
            )
            self._running[spec.sent_id] = running
            self._num_prompt_logprobs += spec.num_prompt_logprobs
            seat = None
            return running
        except HeadraceError as error:
            self.count_refused(error)
            span.fail(error.reason)
            span.end()
            log.info("request refused", extra={"request_id": message.request_id[:64], "reason": error.reason})
            raise
        except asyncio.CancelledError:
            self._metrics.requests[outcome_of_leaving(deadline_s)].inc()
            span.set({"headrace.outcome": outcome_of_leaving(deadline_s)})
            span.end()
            raise
        finally:
            if seat is not None:
                seat.leave()
            self._num_entering -= 1
            self._check_idle()

    async def tokenize(self, message: generation_service_pb2.GenerateRequest, caller: Caller) -> list[int]:
        """Return the tokens of a request's prompt, whose other fields are not looked at.

        Raises:
            HeadraceError: as `open`, of a prompt.
        """
        self._check_open()
        self._admission.check_model(message.model)
        deadline_s = time.monotonic() + self._settings.request_timeout_s
        return await self._admission.prompt_ids(message, self.fleet.model, caller, deadline_s=deadline_s)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token stands for, alone; see `Tokenizer.token_bytes`."""
        return self._tokenizer.token_bytes(token_id)

    def text_of(self, token_ids: list[int]) -> str:
        """Return the text of these tokens, without the special ones'."""
        return self._tokenizer.text_of(token_ids)

    def template_knows(self, word: str) -> bool:
        """Return whether a chat template of the model's has `word` in it."""
        return any(word in text for text in self._tokenizer.config.templates.values())

    def hides(self, word: str) -> bool:
        """Return whether `word` is a special token, which answers do not show."""
        return word in self._tokenizer.specials

    def count_refused(self, error: HeadraceError | None) -> None:
        """Count a request that was not opened; None: its client left."""
        self._metrics.requests["cancelled" if error is None else outcome_of(error)].inc()
        if error is not None:
            self._metrics.refused.labels(error.reason).inc()

    def close(self, running: RunningRequest) -> None:
        """End a request's bookkeeping, and what still runs of it; idempotent."""
        running.close()
        if self._running.pop(running.spec.sent_id, None) is not None:
            self._num_prompt_logprobs -= running.spec.num_prompt_logprobs
        self._check_idle()

    def info(self) -> generation_service_pb2.GetServerInfoResponse:
        """Return what is served and by whom."""
        model = self.fleet.model
        return generation_service_pb2.GetServerInfoResponse(
            model_name=self.model_name,
            model_fingerprint=self.fleet.fingerprint,
            max_context_tokens=model.max_context_tokens if model else 0,
            workers=[_worker_status(link) for link in self.fleet.links],
            num_queued=self.num_queued,
            num_running=self.num_running,
            version=__version__,
            metrics_port=self._metrics_port,
            default_sampling=encode_sampling(self._sampling),
        )

    async def _admit(
        self,
        message: generation_service_pb2.GenerateRequest,
        caller: Caller,
        wait: EndableWait,
        *,
        arrival_s: float,
        deadline_s: float,
    ) -> RequestSpec:
        """Check and tokenize; whatever takes time is waited for in `wait`."""
        admission, model = self._admission, self.fleet.model
        asked = admission.check(message, self._keys.slo_class_of(caller) if self._keys else "")
        prompt = admission.prompt_now(asked, model)
        tokenized_s = time.monotonic()
        if prompt is None or model is None:
            async with wait:
                if prompt is None:
                    prompt = await admission.prompt(asked, model, caller, deadline_s=deadline_s)
                    tokenized_s = time.monotonic()
                model = self.fleet.model or await self._wait_fleet(arrival_s, deadline_s)
        times = {"arrival_s": arrival_s, "tokenized_s": tokenized_s, "deadline_s": deadline_s}
        return admission.admit(asked, prompt, model, **times)

    async def _wait_fleet(self, arrival_s: float, deadline_s: float) -> FleetModel:
        """Wait until workers are there to say what the fleet can do."""
        left_s = deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(min(self._settings.no_workers_timeout_s, left_s)):
                return await self.fleet.wait_model()
        except TimeoutError:
            if left_s <= self._settings.no_workers_timeout_s:
                raise deadline_error(deadline_s - arrival_s) from None
            missing = self.fleet.missing() or "no worker was ready in time"
            raise UnavailableError("NO_WORKERS", missing) from None

    def _check_open(self) -> None:
        if self._is_draining:
            raise UnavailableError("DRAINING", "the router is stopping; try another one")

    def _check_idle(self) -> None:
        if self.num_running == 0:
            self._idle.set()

    def kv_used(self) -> float:
        """Return the share of the decoding workers' pages in use, 0 to 1. Also called from the metrics thread."""
        workers = [link.worker for link in self.fleet.links]
        decoding = [worker for worker in workers if worker is not None and worker.can_decode]
        num_pages = sum(worker.info.num_pages for worker in decoding)
        num_free = sum(worker.load.num_free_pages for worker in decoding)
        return 1 - num_free / num_pages if num_pages else 0.0

    def worker_states(self) -> Sequence[tuple[str, str]]:
        """Return each worker's (role, state). Also called from the metrics thread."""
        return [(_role_name(link), link.state.value) for link in self.fleet.links]

    def circuits(self) -> Sequence[tuple[str, str]]:
        """Return each worker's (role, circuit). Also called from the metrics thread."""
        now_s = time.monotonic()
        return [(_role_name(link), link.breaker.circuit(now_s).value) for link in self.fleet.links]


def _role_name(link: Link) -> str:
    return ROLE_NAMES.get(link.info.role, "unknown") if link.info else "unknown"


def _worker_status(link: Link) -> generation_service_pb2.WorkerStatus:
    status = generation_service_pb2.WorkerStatus(
        address=link.address,
        role=link.info.role if link.info else WORKER_ROLE_UNSPECIFIED,
        state=link.state.value,
        detail=link.detail,
    )
    now_s = time.monotonic()
    circuit = link.breaker.circuit(now_s)
    status.circuit = circuit.value
    if circuit is not Circuit.CLOSED and not status.detail:
        until = (
            f"for {link.breaker.left_s(now_s):.1f} s more" if circuit is Circuit.OPEN else "until a sequence succeeds"
        )
        status.detail = f"circuit {circuit.value} {until}; it failed last with {link.breaker.last_reason}"
    if link.info is not None:
        status.num_pages = link.info.num_pages
        status.metrics_port = link.info.metrics_port
        status.transports.extend(link.info.transports)
    if link.worker is not None:
        load = link.worker.load
        status.num_free_pages = load.num_free_pages
        status.num_running = load.num_running
        status.num_waiting = load.num_waiting
        status.num_leases = load.num_leases
        if transfer := link.worker.last_transfer:
            status.transport_in_use, status.transfer_bytes_per_s = transfer.transport, transfer.bytes_per_s
    return status
