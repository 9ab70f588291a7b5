"""The decode worker: sessions and sequences. Event loop only; the scheduler runs on the engine thread.

    a sequence:  QUEUED ──pages──► taken from elsewhere, or computed here ──joined──► RUNNING ──last token──► over
                    └──────── failure, cancel, deadline, session end, higher attempt ────┴──────┬─────────────┘
                                                                                         ASIDE ─┘
    RUNNING ──cancel that keeps the pages──► ASIDE: it goes on at another worker, which takes them

`_end` is the only way out, whatever the phase: it tells the router, aborts in the scheduler, stops the transfer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq

from headrace.v1 import decode_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace_core.batch.finish import FinishRule
from headrace_core.batch.step_book import Failed, FetchReady
from headrace_core.config import DecodeSettings
from headrace_core.engine.engine import News
from headrace_core.errors import HandoffLostError, HeadraceError, InvalidRequestError, UnavailableError
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.reasons import label
from headrace_core.tracing.span import Kind
from headrace_core.tracing.stages import Stages
from headrace_core.transfer.grpc import SERVICE as TRANSFER_SERVICE
from headrace_core.transfer.hold import HOLD_SERVICE, Side, TakeError, add_hold_servicer
from headrace_core.transfer.taker import DRAIN_TIMEOUT_S, Taker, TransferStats
from headrace_core.transfer.transports import usable
from headrace_core.transfer.values import Admission, FirstToken, Owner, replaced, stale_attempt
from headrace_core.worker.host import Loader, WorkerHost
from headrace_core.worker.loading import load_worker_model
from headrace_core.worker.prefix_fetcher import PrefixFetcher, model_taker
from prometheus_client import CollectorRegistry

from headrace_decode.events import DecodeEvent, Output, PagesReady, Preempted, Scored, SequenceEvent, Started
from headrace_decode.held_prefixes import PrefixHeld
from headrace_decode.metrics import DecodeMetrics
from headrace_decode.prefix_holder import PrefixHolder
from headrace_decode.scheduler import DecodeScheduler
from headrace_decode.sequence import Sequence, decode_spec, refuse
from headrace_decode.server import DECODE_SERVICE, add_decode_servicer
from headrace_decode.session import MOST_UNREAD_BYTES, PATIENCE_S, Session
from headrace_decode.speculation import Speculation

log = logging.getLogger(__name__)


class DecodeService:
    """See `process.Service`. Tests give what follows `settings`."""

    def __init__(
        self,
        settings: DecodeSettings,
        *,
        loader: Loader = load_worker_model,
        transports: Seq[str] = (),
        most_unread_bytes: int = MOST_UNREAD_BYTES,
        patience_s: float = PATIENCE_S,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> None:
        self.registry = CollectorRegistry()
        self.metrics_port = 0
        self.addresses: Mapping[str, str] = {}
        self._metrics = DecodeMetrics(self.registry, Speculation.of(settings).method)
        self._settings = settings
        self._loader = loader
        self._transports = transports or usable(settings.transport, has_tls=settings.tls is not None)
        self._most_unread_bytes = most_unread_bytes
        self._patience_s = patience_s
        self._drain_timeout_s = drain_timeout_s
        is_both = settings.role == "both"
        self.host: WorkerHost[DecodeScheduler] = WorkerHost(
            settings,
            role=types_pb2.WORKER_ROLE_BOTH if is_both else types_pb2.WORKER_ROLE_DECODE,
            services=[DECODE_SERVICE, HOLD_SERVICE, TRANSFER_SERVICE],
            transports=self._transports,
            metrics=self._metrics.worker,
        )
        self.failed = self.host.failed
        self.prefixes = PrefixHolder(
            self.host,
            self._metrics,
            transports=tuple(self._transports),
            frame_bytes=settings.frame_kib << 10,
            is_ours=self._is_ours,
        )
        self._fetcher = PrefixFetcher(self.host, self._metrics.worker, on_taken=self._on_fetched)
        self._taker: Taker | None = None
        self._num_keys = 0
        self._num_groups = 0
        self._sessions: dict[int, Session] = {}
        self._sequences: dict[int, Sequence] = {}
        self._taking: set[asyncio.Task[TransferStats | None]] = set()
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
        server = self.host.server.grpc
        add_decode_servicer(self, server)
        add_hold_servicer(self.prefixes, server)
        for end in self.prefixes.ends:
            end.serve(server)
        self.host.metrics_port = self.metrics_port
        address = await self.host.bind()
        model = await self.host.load(self._loader)
        settings = self._settings
        scheduler = DecodeScheduler(
            PageAllocator(model.num_pages, model.layout.page_size, num_lanes=model.num_lanes),
            model.limits,
            max_step_tokens=settings.max_step_tokens,
            max_step_sequences=settings.max_step_sequences,
            max_waiting_sequences=settings.max_waiting_sequences,
            speculation=Speculation.of(settings),
        )
        self._taker = model_taker(
            model,
            self._transports,
            connect=self.host.connect,
            timeout_s=settings.transfer_timeout_s,
            drain_timeout_s=self._drain_timeout_s,
        )
        self._fetcher.start(self._taker, timeout_s=settings.transfer_timeout_s)
        self.prefixes.start(model, scheduler.pages.pool.generation)
        await self.host.go(model, scheduler, self._on_news)
        return address

    async def drain(self) -> None:
        """See `process.Service`: sequences under way finish or are taken, and their routers have read how."""
        self.host.begin_drain()
        await self._idle.wait()
        for session in list(self._sessions.values()):
            await session.wait_read()

    async def stop(self) -> None:
        """See `process.Service`."""
        error = UnavailableError("DRAINING", "the worker is going away; try another")
        for session in list(self._sessions.values()):
            self.close_session(session, error)
        if self._taking:
            await asyncio.wait(self._taking)
        await self._fetcher.close()
        if self._taker:
            await self._taker.close()
        self.prefixes.stop()
        await self.host.stop()
        await self.prefixes.close()

    def open_session(self, router_id: int, *, incarnation: int | None = None) -> Session:
        """Begin a session; an earlier one of the same router, whose connection broke, ends.

        Args: `incarnation` is whom the router means; None: whoever answers.

        Raises:
            HandoffLostError: WORKER_RESTARTED, it means another process.
            UnavailableError: STARTING, DRAINING.
        """
        if incarnation not in (None, self.host.incarnation):
            raise HandoffLostError(
                "WORKER_RESTARTED",
                "the session reached another process than the one that said who it is; it has started again, or several"
                " are behind its address: list each by an address of its own",
            )
        self.host.require_ready()
        earlier = self._sessions.get(router_id)
        if earlier is not None:
            self.close_session(earlier, UnavailableError("SESSION_CLOSED", "the router opened another session"))
        self._num_groups += 1
        group = self._num_groups

        def on_full(is_full: bool) -> None:
            self._metrics.paused_sessions.inc(1 if is_full else -1)
            self.host.engine.submit(lambda s: s.pause(group) if is_full else s.resume(group))

        def on_slow(error: HeadraceError) -> None:
            self._metrics.slow_readers.inc()
            log.warning("slow reader", extra={"router": f"{router_id:016x}"})
            self.close_session(session, error)

        session = self._sessions[router_id] = Session(
            router_id,
            group,
            on_full=on_full,
            on_slow=on_slow,
            most_bytes=self._most_unread_bytes,
            patience_s=self._patience_s,
        )
        return session

    def close_session(self, session: Session, error: HeadraceError) -> None:
        """End a session and its sequences. Idempotent."""
        if self._sessions.get(session.router_id) is not session:
            return
        del self._sessions[session.router_id]
        session.close(error)
        for key in list(session.keys.values()):
            self._end(self._sequences[key])

    def start_sequence(self, session: Session, message: pb.StartSequence) -> None:
        """Start a sequence; what becomes of it, a refusal too, is told in the session."""
        if self._sessions.get(session.router_id) is not session:
            return
        try:
            self.host.require_ready()
            spec = decode_spec(message)
            spec.check(self.host.model.limits)
            current = self._sequence(session, message.sequence_number)
            if current and current.spec.attempt >= spec.attempt:
                raise stale_attempt(spec.attempt, current.spec.attempt)
        except HeadraceError as error:
            refuse(session, message, error)
            return
        if current:
            self._end(current, replaced(spec.attempt))
        self._num_keys += 1
        now = time.monotonic()
        trace = Stages(self.host.tracer.join("sequence", message.traceparent), "waiting")
        sequence = Sequence.begin(self._num_keys, session, spec, message, trace, now)
        left_s = sequence.ends_s - now
        sequence.deadline = asyncio.get_running_loop().call_later(left_s, self._end, sequence, sequence.late())
        session.keys[sequence.number] = sequence.key
        self._sequences[sequence.key] = sequence
        self._idle.clear()
        has_handoff, local_below = bool(message.prefill_address), message.local_below
        num_elsewhere = sequence.cached.num_tokens if sequence.cached and sequence.takes_prefix else 0

        def add(scheduler: DecodeScheduler) -> None:
            scheduler.add(
                sequence.key,
                spec,
                now,
                group=session.group,
                has_handoff=has_handoff,
                local_below=local_below,
                num_cached_elsewhere=num_elsewhere,
            )
            scheduler.admit(now)

        # A prompt that is computed elsewhere need not wait for a step that is computed here.
        self.host.engine.submit_at_once(add)

    def cancel_sequence(self, session: Session, number: int, *, attempt: int, keeps_pages: bool = False) -> None:
        """End a sequence, unless it is of a higher attempt; an unknown one is no error.

        With `keeps_pages` one that joined is set aside instead: it is over with the next call without.
        """
        sequence = self._sequence(session, number)
        if sequence is None or sequence.spec.attempt > attempt:
            return
        if keeps_pages and sequence.has_joined:
            sequence.is_aside = True
            self.host.engine.submit(lambda scheduler: scheduler.set_aside(sequence.key))
        else:
            self._end(sequence)

    def _sequence(self, session: Session, number: int) -> Sequence | None:
        key = session.keys.get(number)
        return None if key is None else self._sequences[key]

    def _is_ours(self, owner: Owner) -> bool:
        router_id, number = owner
        session = self._sessions.get(router_id)
        return session is not None and number in session.keys

    def _take(self, sequence: Sequence, page_ids: Seq[int], num_have_tokens: int) -> None:
        """Have the sequence computed elsewhere and what is not here of its cache brought here."""
        assert self._taker is not None, "ready"
        cached = None if sequence.takes_prefix else sequence.cached
        order = sequence.order(self.host.model, num_have_tokens, cached)

        def on_first(admission: Admission, first: FirstToken) -> None:
            self._on_first(sequence, admission, first)

        def on_done(taking: asyncio.Task[TransferStats | None]) -> None:
            self._taking.discard(taking)
            self._metrics.handoffs.dec()
            self._on_taken(sequence, taking)

        taking = self._taker.take(order, sequence.prefill_address, page_ids, age=sequence.key, on_first=on_first)
        sequence.taking = asyncio.ensure_future(taking)
        self._taking.add(sequence.taking)
        self._metrics.handoffs.inc()
        sequence.taking.add_done_callback(on_done)

    def _on_first(self, sequence: Sequence, admission: Admission, first: FirstToken) -> None:
        """Tell the first token at once: its cache is still on the way."""
        spec = sequence.spec
        ours = FinishRule(spec.params, self.host.model.limits).reason(
            first.token.token_id, num_output_tokens=spec.num_output_tokens + 1, num_tokens=len(spec.token_ids) + 1
        )
        if ours is not first.finish:
            problem = f"the prefill worker says {first.finish} of a first token of which this one says {ours}"
            raise TakeError(Side.HOLDER, InvalidRequestError("BAD_HANDOFF", problem))
        if not sequence.is_over:
            sequence.tell_first(admission, first)

    def _on_taken(self, sequence: Sequence, taking: asyncio.Task[TransferStats | None]) -> None:
        worker = self._metrics.worker
        error = None if taking.cancelled() else taking.exception()
        if error is None and not taking.cancelled() and taking.result() and not sequence.is_over:
            moved = sequence.moved = taking.result()
            assert moved is not None, "asked just now"
            if moved.num_pages:
                self._metrics.observe_transfer(moved)
                worker.transfer_bytes.labels(moved.transport, "received").inc(moved.num_bytes)
            sequence.trace.next("joining")
            self.host.engine.submit(lambda scheduler: scheduler.arrived(sequence.key, sequence.first_token_id))
            return
        if isinstance(error, TakeError):
            worker.handoff_failures.labels(label(error.error.reason)).inc()
            self._end(sequence, error.error, error.side)
        elif error is not None:
            log.error("transfer failed", extra={"request_id": sequence.spec.request_id}, exc_info=error)
            self._end(sequence, HeadraceError("BUG", "internal error"))
        else:
            self._end(sequence)  # its first token was its last, or it is over already
        # After the abort: the transfer is drained, its pages may have a new owner.
        self.host.engine.submit(lambda scheduler: scheduler.drained(sequence.key))

    def _on_fetched(self, key: int, moved: TransferStats) -> None:
        self._metrics.observe_transfer(moved)
        sequence = self._sequences.get(key)
        if sequence is not None:
            sequence.moved = moved

    def _on_news(self, news: News[DecodeEvent]) -> None:
        if news.report:
            self._metrics.observe_step(news.report)
        sessions: dict[int, Session] = {}
        for event in news.events:
            if isinstance(event, PrefixHeld):
                self.prefixes.on_held(event)
                continue
            sequence = self._sequences.get(event.key)
            if sequence is not None and not sequence.is_aside:
                sessions[sequence.session.group] = sequence.session
                self._on_event(sequence, event)
        for session in sessions.values():
            session.flush(news.report.duration_s if news.report else 0.0)

    def _on_event(self, sequence: Sequence, event: SequenceEvent) -> None:
        worker = self._metrics.worker
        match event:
            case FetchReady(num_have_tokens=num_have):
                sequence.trace.next("prefix_fetch", kind=Kind.CLIENT)
                self._fetcher.fetch(event, sequence.order(self.host.model, num_have, sequence.cached))
            case PagesReady(page_ids=page_ids, num_have_tokens=num_have, queue_s=queue_s):
                worker.queue_seconds.observe(queue_s)
                sequence.queue_s = queue_s
                sequence.trace.next("hand_off", kind=Kind.CLIENT)
                self._take(sequence, page_ids, num_have)
            case Started(queue_s=queue_s, num_cached_tokens=num_cached):
                if not sequence.taking:
                    worker.queue_seconds.observe(queue_s)
                    worker.prefilled_tokens.inc(len(sequence.spec.token_ids))
                worker.cache_query_tokens.inc(len(sequence.spec.token_ids))
                worker.cache_hit_tokens.inc(num_cached)
                sequence.has_joined = True
                sequence.tell_joined(event)
            case Scored(logprobs=logprobs):
                sequence.tell_scored(logprobs)
            case Output(finish=finish):
                worker.sampled_tokens.inc()
                sequence.tell_output(event)
                if finish:
                    self._end(sequence)
            case Preempted():
                self._metrics.preemptions.inc()
                sequence.num_preemptions += 1
            case Failed(error=error):
                self._end(sequence, error)

    def _end(self, sequence: Sequence, error: HeadraceError | None = None, side: Side = Side.TAKER) -> None:
        """End a sequence, whatever its phase: the only place. Without `error` its router is told nothing."""
        if sequence.is_over:
            return
        sequence.close(error)
        del self._sequences[sequence.key]
        del sequence.session.keys[sequence.number]
        self.host.engine.submit(lambda scheduler: scheduler.abort(sequence.key))
        if sequence.taking:
            sequence.taking.cancel()
        else:
            self._fetcher.cancel(sequence.key)
        if error and not sequence.is_aside:
            sequence.tell_failure(error, side)
        log.info("sequence ended", extra=sequence.report(error))
        if not self._sequences:
            self._idle.set()
