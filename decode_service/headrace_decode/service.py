"""The decode worker: sessions and sequences. Event loop only; the scheduler runs on the engine thread.

    a sequence:  STARTING ──joined the batch──► STARTED ──last token, failure, cancel, session end──► over
                    └────────failure, cancel, session end, higher attempt──────────────────────────────┘

`_end` is the only way out, whatever the phase: it tells whoever waits, aborts in the scheduler, stops the transfer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.v1 import types_pb2
from headrace_core.batch.finish import FinishRule
from headrace_core.batch.spec import SequenceSpec
from headrace_core.batch.step_book import Failed
from headrace_core.config import DecodeSettings
from headrace_core.engine.engine import News
from headrace_core.errors import (
    ConflictError,
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.reasons import label
from headrace_core.request import check_request_id
from headrace_core.transfer.taker import DRAIN_TIMEOUT_S, Receiver, TransferStats, check_ticket
from headrace_core.transfer.ticket import Ticket
from headrace_core.transfer.transports import TRANSPORTS
from headrace_core.worker.host import Loader, WorkerHost
from headrace_core.worker.loading import load_worker_model
from prometheus_client import CollectorRegistry

from headrace_decode.metrics import DecodeMetrics
from headrace_decode.scheduler import (
    DecodeEvent,
    DecodeScheduler,
    Output,
    PagesReady,
    Preempted,
    Started,
)
from headrace_decode.server import DECODE_SERVICE, add_decode_servicer
from headrace_decode.session import MAX_UNREAD_TOKENS, Session

log = logging.getLogger(__name__)

_AUTO_TRANSPORTS = ("grpc",)


@dataclass(slots=True, eq=False)
class _Sequence:
    key: int
    number: int
    session: Session
    spec: SequenceSpec
    started: asyncio.Future[Started]
    pages: asyncio.Future[Sequence[int]]
    began_s: float
    taking: asyncio.Task[TransferStats] | None = None
    moved: TransferStats | None = None
    has_arrived: bool = False
    num_output_tokens: int = 0
    num_preemptions: int = 0
    is_over: bool = False


class DecodeService:
    """See `process.Service`. Tests give what follows `settings`."""

    def __init__(
        self,
        settings: DecodeSettings,
        *,
        loader: Loader = load_worker_model,
        transports: Sequence[str] = (),
        max_unread_tokens: int = MAX_UNREAD_TOKENS,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> None:
        self.registry = CollectorRegistry()
        self._metrics = DecodeMetrics(self.registry)
        self._settings = settings
        self._loader = loader
        self._transports = transports or (_AUTO_TRANSPORTS if settings.transport == "auto" else (settings.transport,))
        self._max_unread_tokens = max_unread_tokens
        self._drain_timeout_s = drain_timeout_s
        is_both = settings.role == "both"
        self.host: WorkerHost[DecodeScheduler] = WorkerHost(
            settings,
            role=types_pb2.WORKER_ROLE_BOTH if is_both else types_pb2.WORKER_ROLE_DECODE,
            services=[DECODE_SERVICE],
            transports=self._transports,
            metrics=self._metrics.worker,
        )
        self.failed = self.host.failed
        self._receiver: Receiver | None = None
        self._num_keys = 0
        self._sessions: dict[str, Session] = {}
        self._sequences: dict[int, _Sequence] = {}
        self._by_request: dict[tuple[str, int], _Sequence] = {}
        self._taking: set[asyncio.Task[TransferStats]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_sequences(self) -> int:
        """Sequences begun and not over."""
        return len(self._sequences)

    @property
    def num_sessions(self) -> int:
        """Sessions open."""
        return len(self._sessions)

    async def start(self) -> str:
        """See `process.Service`."""
        add_decode_servicer(self, self.host.server.grpc)
        address = await self.host.bind()
        model = await self.host.load(self._loader)
        settings = self._settings
        scheduler = DecodeScheduler(
            PageAllocator(model.num_pages, model.layout.page_size),
            model.limits,
            max_step_tokens=settings.max_step_tokens,
            max_step_sequences=settings.max_step_sequences,
            max_waiting_sequences=settings.max_waiting_sequences,
        )
        self._receiver = Receiver(
            model.cache,
            fingerprint=model.fingerprint,
            layout=model.layout,
            transports={name: TRANSPORTS[name](model.cache) for name in self._transports},
            timeout_s=settings.transfer_timeout_s,
            drain_timeout_s=self._drain_timeout_s,
        )
        await self.host.go(model, scheduler, self._on_news)
        return address

    async def drain(self) -> None:
        """See `process.Service`: sequences under way finish."""
        self.host.begin_drain()
        await self._idle.wait()

    async def stop(self) -> None:
        """See `process.Service`."""
        error = UnavailableError("DRAINING", "the worker is going away; try another")
        for session in list(self._sessions.values()):
            self._close(session, error)
        if self._taking:
            await asyncio.wait(self._taking)
        if self._receiver:
            await self._receiver.close()
        await self.host.stop()

    def open_session(self, session_id: str) -> Session:
        """Begin a session.

        Raises:
            ConflictError: SESSION_EXISTS.
            UnavailableError: STARTING, DRAINING.
        """
        self.host.require_ready()
        check_request_id(session_id)
        if session_id in self._sessions:
            raise ConflictError("SESSION_EXISTS", f"session {session_id} is open; choose a new id at each connection")
        self._sessions[session_id] = Session(session_id, max_unread_tokens=self._max_unread_tokens)
        return self._sessions[session_id]

    def close_session(self, session: Session) -> None:
        """End a session whose reader is gone. Idempotent."""
        self._close(session, UnavailableError("SESSION_CLOSED", "the session's stream ended"))

    async def start_sequence(
        self, session_id: str, number: int, spec: SequenceSpec, ticket: Ticket | None
    ) -> tuple[float, TransferStats | None]:
        """Start a sequence; return seconds queued, and what was moved, when it runs. Cancelling aborts it.

        Raises:
            HeadraceError: as `DecodeService.Start` lists.
        """
        self.host.require_ready()
        spec.check(self.host.model.limits)
        session = self._sessions.get(session_id)
        if session is None:
            raise NotFoundError("UNKNOWN_SESSION", "open the session with StreamSteps first")
        transport = self._check_source(spec, ticket)
        sequence = self._register(session, number, spec)
        key, now = sequence.key, sequence.began_s
        first_token_id = ticket.first_token.token_id if ticket else None
        self.host.engine.submit(lambda scheduler: scheduler.add(key, spec, first_token_id, now))
        if ticket:
            self._take(sequence, ticket, transport)
        try:
            started = await sequence.started
            if sequence.taking:
                await asyncio.wait([sequence.taking])  # until the lease is released
        except asyncio.CancelledError:
            self._end(sequence)
            raise
        return started.queue_s, sequence.moved

    def cancel_sequence(self, session_id: str, number: int) -> None:
        """Abort a sequence; an unknown one is no error."""
        session = self._sessions.get(session_id)
        key = session.keys.get(number) if session else None
        if key is not None:
            self._end(self._sequences[key])

    def _check_source(self, spec: SequenceSpec, ticket: Ticket | None) -> str:
        """Return the transport by which the sequence's cache comes; empty if it is computed here."""
        if ticket is None:
            return ""
        check_ticket(ticket, spec)
        if not 0 <= ticket.first_token.token_id < self.host.model.limits.vocab_size:
            raise InvalidRequestError("BAD_TOKEN", "the first token is outside the vocabulary")
        ended = FinishRule(spec.params, self.host.model.limits).reason(
            ticket.first_token.token_id,
            num_output_tokens=spec.num_output_tokens + 1,
            num_tokens=len(spec.token_ids) + 1,
        )
        if ended:
            raise InvalidRequestError("BAD_HANDOFF", f"the first token already ends the sequence: {ended.value}")
        assert self._receiver is not None, "ready"
        return self._receiver.choose(ticket)

    def _register(self, session: Session, number: int, spec: SequenceSpec) -> _Sequence:
        if number in session.keys:
            raise InvalidRequestError("BAD_REQUEST", f"sequence_number {number} is in use in this session")
        current = self._by_request.get((spec.request_id, spec.sample_index))
        if current and current.spec.attempt >= spec.attempt:
            raise HandoffLostError(
                "STALE_ATTEMPT", f"attempt {spec.attempt} comes after attempt {current.spec.attempt}"
            )
        if current:
            self._end(current, HandoffLostError("STALE_ATTEMPT", f"attempt {spec.attempt} replaced this one"))
        loop = asyncio.get_running_loop()
        self._num_keys += 1
        sequence = _Sequence(
            self._num_keys, number, session, spec, loop.create_future(), loop.create_future(), time.monotonic()
        )
        session.keys[number] = sequence.key
        self._sequences[sequence.key] = self._by_request[spec.request_id, spec.sample_index] = sequence
        self._idle.clear()
        return sequence

    def _take(self, sequence: _Sequence, ticket: Ticket, transport: str) -> None:
        """Begin to take the handed-off pages."""
        assert self._receiver is not None, "ready"

        def on_taken() -> None:
            sequence.has_arrived = True
            self.host.engine.submit(lambda scheduler: scheduler.arrived(sequence.key))

        def on_done(taking: asyncio.Task[TransferStats]) -> None:
            self._taking.discard(taking)
            self._on_taken(sequence, taking)

        sequence.taking = asyncio.ensure_future(self._receiver.take(ticket, transport, sequence.pages, on_taken))
        self._taking.add(sequence.taking)
        sequence.taking.add_done_callback(on_done)

    def _on_taken(self, sequence: _Sequence, taking: asyncio.Task[TransferStats]) -> None:
        worker = self._metrics.worker
        if not taking.cancelled() and taking.exception() is None:
            moved = sequence.moved = taking.result()
            self._metrics.transfer_seconds.labels(moved.transport).observe(moved.duration_s)
            worker.transfer_bytes.labels(moved.transport, "received").inc(moved.num_bytes)
            return
        error = None if taking.cancelled() else taking.exception()
        if error is not None and not isinstance(error, HeadraceError):
            log.error("transfer failed", extra={"request_id": sequence.spec.request_id}, exc_info=error)
            error = HeadraceError("BUG", "internal error")
        if error:
            worker.handoff_failures.labels(label(error.reason)).inc()
        self._end(sequence, error)
        # After the abort: the transfer is drained, its pages may have a new owner.
        self.host.engine.submit(lambda scheduler: scheduler.drained(sequence.key))

    def _on_news(self, news: News[DecodeEvent]) -> None:
        sessions: dict[str, Session] = {}
        for event in news.events:
            sequence = self._sequences.get(event.key)
            if sequence is None:
                continue
            sessions[sequence.session.session_id] = sequence.session
            self._on_event(sequence, event)
        for session in sessions.values():
            session.flush(news.report.duration_s if news.report else 0.0)

    def _on_event(self, sequence: _Sequence, event: DecodeEvent) -> None:
        worker = self._metrics.worker
        match event:
            case PagesReady(page_ids=page_ids, queue_s=queue_s):
                worker.queue_seconds.observe(queue_s)
                if not sequence.pages.done():
                    sequence.pages.set_result(page_ids)
            case Started(queue_s=queue_s, num_cached_tokens=num_cached):
                if not sequence.taking:
                    worker.queue_seconds.observe(queue_s)
                    worker.prompt_tokens.inc(len(sequence.spec.token_ids))
                    worker.cache_query_tokens.inc(len(sequence.spec.token_ids))
                    worker.cache_hit_tokens.inc(num_cached)
                if not sequence.started.done():  # its call may have been cancelled in this very turn of the loop
                    sequence.started.set_result(event)
            case Output(token=token, finish=finish):
                worker.output_tokens.inc()
                sequence.num_output_tokens += 1
                try:
                    sequence.session.put_token(sequence.number, token, finish)
                except OverloadedError as error:
                    self._metrics.slow_readers.inc()
                    log.warning("slow reader", extra={"session": sequence.session.session_id})
                    return self._close(sequence.session, error)
                if finish:
                    self._end(sequence)
            case Preempted():
                self._metrics.preemptions.inc()
                sequence.num_preemptions += 1
            case Failed(error=error):
                self._end(sequence, error)
        return None

    def _close(self, session: Session, error: HeadraceError) -> None:
        if self._sessions.get(session.session_id) is not session:
            return
        del self._sessions[session.session_id]
        for key in list(session.keys.values()):
            self._end(self._sequences[key], error)
        session.close(error)

    def _end(self, sequence: _Sequence, error: HeadraceError | None = None) -> None:
        """End a sequence, whatever its phase: the only place. Without `error` its session is told nothing."""
        if sequence.is_over:
            return
        sequence.is_over = True
        del self._sequences[sequence.key]
        del self._by_request[sequence.spec.request_id, sequence.spec.sample_index]
        del sequence.session.keys[sequence.number]
        self.host.engine.submit(lambda scheduler: scheduler.abort(sequence.key))
        if sequence.taking and not sequence.taking.done() and not sequence.has_arrived:
            sequence.taking.cancel()
        if not sequence.started.done():
            sequence.started.set_exception(error or UnavailableError("CANCELLED", "the sequence was cancelled"))
        elif error:
            sequence.session.put_failure(sequence.number, error)
        self._report(sequence, error)
        if not self._sequences:
            self._idle.set()

    def _report(self, sequence: _Sequence, error: HeadraceError | None) -> None:
        moved = sequence.moved
        log.info(
            "sequence ended",
            extra={
                "request_id": sequence.spec.request_id,
                "sample": sequence.spec.sample_index,
                "attempt": sequence.spec.attempt,
                "context_tokens": len(sequence.spec.token_ids),
                "output_tokens": sequence.num_output_tokens,
                "seconds": time.monotonic() - sequence.began_s,
                "transfer_s": moved.duration_s if moved else 0.0,
                "pages": moved.num_pages if moved else 0,
                "bytes": moved.num_bytes if moved else 0,
                "preemptions": sequence.num_preemptions,
                "reason": error.reason if error else "",
            },
        )
