"""One client request under way: its samples, their tasks, and the pieces that its client is told.

    RUNNING ──► OK | FAILED (one error, all samples end) | CANCELLED (the client left)
Nothing waits for the client but its own stream: samples go on, and what piles up leaves in one message. A request that
failed is over at once, though its client may read so little that the stream can't tell it: then an error is all of the
request that is left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from headrace_core.errors import DeadlineError, HeadraceError, OverloadedError
from headrace_core.reasons import label
from headrace_core.tracing.span import NOT_TRACED, Span

from headrace_router.metrics import RouterMetrics
from headrace_router.placement.prefix import Prefix
from headrace_router.requests.admission import RequestSpec
from headrace_router.requests.cached import Cached
from headrace_router.requests.flow import Flow
from headrace_router.requests.piece import Piece
from headrace_router.requests.sample import OnText, Sample
from headrace_router.requests.sample_state import SampleState
from headrace_router.requests.tracing import SampleTrace, end_request
from headrace_router.requests.waiting import Seat
from headrace_router.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_DEADLINE_SLACK_S = 0.02
"""A client that leaves this shortly before its deadline left because of it."""

_MOST_UNREAD_LOGPROBS = 65_536
"""Tokens of a request whose log-probabilities may wait for its client: with 20 each, about 100 MB."""

_OUTCOMES = {
    "INVALID_ARGUMENT": "invalid",
    "NOT_FOUND": "invalid",
    "UNAUTHENTICATED": "invalid",
    "RESOURCE_EXHAUSTED": "overloaded",
    "UNAVAILABLE": "unavailable",
    "DEADLINE_EXCEEDED": "deadline",
}


def outcome_of(error: HeadraceError) -> str:
    """Return the `outcome` label of a request that ended with `error`."""
    return _OUTCOMES.get(error.status, "failed")


def deadline_error(limit_s: float) -> DeadlineError:
    """Return the error of a request whose time is up."""
    return DeadlineError("DEADLINE_EXCEEDED", f"the request did not end in {limit_s:.3g} s")


def outcome_of_leaving(deadline_s: float) -> str:
    """Return the `outcome` label of a request whose client left now."""
    return "deadline" if time.monotonic() >= deadline_s - _DEADLINE_SLACK_S else "cancelled"


class RunningRequest:
    """All samples of one request. Event loop only."""

    def __init__(
        self,
        spec: RequestSpec,
        flow: Flow,
        tokenizer: Tokenizer,
        metrics: RouterMetrics,
        seat: Seat,
        *,
        on_failed: Callable[[RunningRequest], None],
        on_used: Callable[[int], None] | None = None,
        span: Span = NOT_TRACED,
    ) -> None:
        """Start every sample; `close` must follow. The seat in the queue is given up when the first has a worker.

        Args:
            spec: what is asked for.
            flow: runs samples.
            tokenizer: for their text.
            metrics: counts.
            seat: in the queue.
            on_failed: called with this request when it has failed, later than this returns; closes it.
            on_used: told when it closes how many tokens it came to, its prompt included.
            span: its own, which it ends.
        """
        self.spec = spec
        self._span = span
        self._seat = seat
        self._client = (seat.caller.address, seat.caller.name)
        seat.evict = self._evict
        self._flow = flow
        self._on_failed = on_failed
        self._on_used = on_used
        self._metrics = metrics
        self._error: HeadraceError | None = None
        self._wake: asyncio.Future[None] | None = None
        """What the client's stream waits for; a bare future, because an Event costs twice as much per token."""
        self._on_told: Callable[[], None] = _nothing
        self._news: deque[Sample] = deque()
        self._num_open = spec.num_samples
        self._is_closed = False
        loop = asyncio.get_running_loop()
        self._may_queue = [loop.create_future() for _ in range(1, spec.num_samples)]
        """When each but the first may queue: the second once the first's decode worker has the prompt's full pages,
        where the others are to find them; from there on one behind the other, so that many cost the queue no more than
        one."""
        prefix = Prefix(spec.prompt_ids)
        self.samples = [self._sample(index, prefix, tokenizer) for index in range(spec.num_samples)]
        self._traces = [
            SampleTrace(span, sample.waterfall, spec.arrival_s, sample.sample_index) for sample in self.samples
        ]
        metrics.prompt_tokens.inc(len(spec.prompt_ids))
        self._timer = loop.call_later(max(0.0, spec.deadline_s - time.monotonic()), self._on_deadline)
        self._num_running = spec.num_samples
        self._settled: asyncio.Future[None] | None = None
        """Done when none runs any more, if somebody waits for it."""
        self._tasks = [loop.create_task(self._run(sample)) for sample in self.samples]

    @property
    def is_told(self) -> bool:
        """True when the client has been told everything."""
        return not self._num_open

    async def next(self) -> Piece | None:
        """Wait for what the client is to be told next; None: every sample is finished, and it was told all.

        Raises:
            HeadraceError: the request failed; nothing follows.
        """
        while self._num_open:
            piece = self.take()
            if piece is not None:
                return piece
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        if self._error is not None:
            raise self._error
        return None

    def take(self) -> Piece | None:
        """Return the next piece, which counts as told; None if there is none now.

        Raises:
            HeadraceError: the request failed; nothing follows.
        """
        if self._error is not None:
            raise self._error
        while self._news:
            sample = self._news.popleft()
            if sample.is_closed:
                continue
            piece = sample.take()
            self._num_open -= sample.is_closed
            if not sample.unsent.is_empty:
                self._news.append(sample)
            return piece
        return None

    def take_all(self) -> list[Piece]:
        """Return every piece that there is now; they count as told. What comes after a long one is there a turn later.

        Raises:
            HeadraceError: the request failed; nothing follows.
        """
        pieces: list[Piece] = []
        while self._news or self._error is not None:
            piece = self.take()
            if piece is not None:
                pieces.append(piece)
            if piece is not None and piece.prompt_logprobs is not None:
                # Thousands of texts are made of it: others have their turn before the next.
                asyncio.get_running_loop().call_soon(self._on_told)
                break
        return pieces

    def listen(self, on_news: Callable[[], None], on_text: OnText | None = None) -> None:
        """Call `on_news` now and whenever `take` has something, or raises, in the very call that brought it.

        What is nothing but a few tokens' text is given to `on_text` in place of that, once all before it was taken.
        """
        self._on_told = on_news
        for sample in self.samples:
            sample.on_text = on_text
        on_news()

    async def settle(self) -> None:
        """Wait until nothing runs any more of a request whose client was told everything: then `close` cuts nothing."""
        if self._num_running:
            self._settled = asyncio.get_running_loop().create_future()
            await self._settled

    def fail(self, error: HeadraceError) -> None:
        """End the request with `error`; only the first error counts."""
        if self._error is None:
            self._error = error
        self._stop()
        self._wake_stream()
        self._on_told()
        self._on_failed(self)

    def close(self) -> None:
        """End what still runs, count, log, let go of what is large; idempotent. The stream can only end now."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stop()
        outcome = "ok"
        if self._error is not None:
            outcome = outcome_of(self._error)
        elif self._num_open:
            outcome = outcome_of_leaving(self.spec.deadline_s)
        self._metrics.requests[outcome].inc()
        self._log(outcome)
        if self._on_used is not None:
            self._on_used(self._num_used_tokens())
        for trace, sample in zip(self._traces, self.samples, strict=True):
            trace.close(sample)
        end_request(self._span, self.spec, self.samples, outcome=outcome, error=self._error)
        self.samples, self._tasks = [], []
        self._news.clear()
        if self._error is not None:  # its client may not know yet, and not for long
            self.spec = replace(self.spec, prompt_ids=[])

    def _sample(self, index: int, prefix: Prefix, tokenizer: Tokenizer) -> Sample:
        spec = self.spec
        detokenizer = tokenizer.detokenizer(
            silent_ids=spec.silent_ids, is_continuation=spec.is_continuation, shown_ids=spec.shown_ids
        )
        return Sample(
            spec,
            index,
            detokenizer,
            client=self._client,
            prefix=prefix,
            tokens=self._metrics.tokens.traced(self._span.trace_id),
            on_news=self._on_news,
            on_cached=self._on_first_cached if index == 0 and spec.num_samples > 1 else None,
        )

    async def _run(self, sample: Sample) -> None:
        try:
            if sample.sample_index:
                await self._may_queue[sample.sample_index - 1]
            await self._flow.run(sample, self._traces[sample.sample_index], on_placed=lambda: self._on_placed(sample))
        except HeadraceError as error:
            if not any(each.attempt for each in self.samples) and self._error is None:
                self._metrics.refused.labels(label(error.reason)).inc()
            self.fail(error)
        except Exception as error:
            log.error("unhandled error", extra={"request_id": self.spec.request_id}, exc_info=error)
            self.fail(HeadraceError("BUG", "internal error"))
        finally:
            self._seat.leave()
            self._let_next(sample)
            self._observe(sample)
            self._num_running -= 1
            if not self._num_running and self._settled is not None and not self._settled.done():
                self._settled.set_result(None)

    def _on_placed(self, sample: Sample) -> None:
        self._seat.leave()
        if sample.sample_index:
            self._let_next(sample)

    def _on_first_cached(self, cached: Cached) -> None:
        for sample in self.samples[1:] if cached.num_tokens else ():
            sample.cached = cached
        for first in self.samples[:1]:
            self._let_next(first)

    def _let_next(self, sample: Sample) -> None:
        """Let the sample behind this one queue."""
        for following in self.samples[sample.sample_index + 1 :][:1]:
            turn = self._may_queue[sample.sample_index]
            if not turn.done():
                following.prefer = sample.prefill_address or sample.prefer
                turn.set_result(None)

    def _evict(self, error: HeadraceError) -> bool:
        """End the request: as long as it has a seat, nothing of it has begun."""
        self._metrics.refused.labels(error.reason).inc()
        self.fail(error)
        return True

    def _on_news(self, sample: Sample) -> None:
        if sample.has_logprobs and len(sample.unsent.logprobs) > _MOST_UNREAD_LOGPROBS // self.spec.num_samples:
            self.fail(OverloadedError("SLOW_READER", "the stream's log-probabilities are not read; read it faster"))
        elif sample not in self._news:
            self._news.append(sample)
            if self._wake is not None:
                self._wake_stream()
            self._on_told()

    def _wake_stream(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None and not wake.done():
            wake.set_result(None)

    def _on_deadline(self) -> None:
        self.fail(deadline_error(self.spec.deadline_s - self.spec.arrival_s))

    def _stop(self) -> None:
        self._timer.cancel()
        self._seat.leave()
        for task in self._tasks:
            task.cancel()
        for sample in self.samples:
            if not sample.is_over:
                sample.move(SampleState.FAILED)

    def _observe(self, sample: Sample) -> None:
        if sample.state is SampleState.FINISHED:
            if sample.finish_reason is not None:
                self._metrics.finished[sample.finish_reason].inc()
            self._metrics.observe_phases(sample.waterfall, self._span.trace_id)
            tpot_s = _tpot_s(sample)
            if tpot_s is not None:
                self._metrics.tpot.observe(tpot_s)

    def _num_used_tokens(self) -> int:
        has_begun = any(sample.attempt for sample in self.samples)
        return sum(len(sample.output_ids) for sample in self.samples) + has_begun * len(self.spec.prompt_ids)

    def _log(self, outcome: str) -> None:
        if not log.isEnabledFor(logging.INFO):
            return
        first = self.samples[0]
        extra: dict[str, object] = {
            "request_id": self.spec.request_id,
            "outcome": outcome,
            "prompt_tokens": len(self.spec.prompt_ids),
            "output_tokens": sum(len(sample.output_ids) for sample in self.samples),
            "cached_tokens": first.num_cached_tokens,
            "pages": sum(sample.num_transfer_pages for sample in self.samples),
            "bytes": sum(sample.transfer_bytes for sample in self.samples),
            "attempts": max(sample.attempt for sample in self.samples),
            "total_s": time.monotonic() - self.spec.arrival_s,
        }
        if first.first_token_s is not None:
            extra["ttft_s"] = first.first_token_s - self.spec.arrival_s
        tpot_s = _tpot_s(first)
        if tpot_s is not None:
            extra["tpot_s"] = tpot_s
        if self._error is not None:
            extra["reason"] = self._error.reason
        if self._span.is_recorded:
            extra["trace_id"] = self._span.trace_id
        log.info("request ended", extra=extra)


def _nothing() -> None:
    pass


def _tpot_s(sample: Sample) -> float | None:
    num_output = len(sample.output_ids)
    if sample.first_token_s is None or num_output < 2:
        return None
    return (sample.last_token_s - sample.first_token_s) / (num_output - 1)
