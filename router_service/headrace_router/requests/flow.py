"""The life of one sample, from the queue to its last token, and what is done about every failure on the way.

`sample_state.py` draws the states. One attempt is

    place ──► start at the decode worker ──► entries: Prefilled, Joined, tokens ──► the last token, or Failure

The decode worker alone is told, of the prefill worker as well; all that becomes of the sequence comes back on one
stream, in order. Whatever ends an attempt, the sequence is cancelled there unless that worker ended it; what it holds
elsewhere it lets go of by itself. One whose decode worker goes away is placed elsewhere while it runs there, and takes
its pages along: `move.py`. That is no failure, and counts as no attempt.

Reactions to a worker's error (`errors.py` has the tree); AGAIN means: a new attempt with the prompt and every token so
far, after a pause of random length if it has no token yet, other workers preferred, at most `max_attempts` in all, then
RETRIES_EXHAUSTED with the last cause. A failure says whose it is, and only that worker is blamed, in its circuit, too
(`placement/breaker.py`); where it is the channel's, both are avoided next time. A worker knows no more of a request
than the router, which has checked it: what one worker makes of it is not final.

    InvalidRequestError   AGAIN, logged as an error; the second one of a sample: to the client.
                          But BAD_HANDOFF, which is between workers: AGAIN, as often as anything
    LayoutMismatchError   AGAIN, logged as an error
    UnauthenticatedError, PermissionDeniedError
                          AGAIN, logged as an error; the worker gets nothing before its next load report
    OverloadedError       AGAIN; the worker gets nothing before its next load report
    UnavailableError      AGAIN; the same
    HandoffLostError      AGAIN
    TransferCorruptError  AGAIN, logged as an error
    ProtocolError         AGAIN, logged as an error; the worker gets nothing before its next load report
    DeadlineError         AGAIN while the client's own time is not up; then to the client
    WORKER_LOST, HOLDER_LOST: once two workers were lost: RETRIES_EXHAUSTED, for it may be the request that ends its
                          workers, and they have others'. One that is lost twice, for others saw it first, counts once
    anything else         to the client, logged as an error
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.v1 import decode_service_pb2
from headrace_core.errors import (
    DeadlineError,
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    LayoutMismatchError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    TransferCorruptError,
    UnauthenticatedError,
    UnavailableError,
)
from headrace_core.reasons import label
from headrace_core.request import MAX_COUNT

from headrace_router.fleet.session import Ended, Side, Whose
from headrace_router.fleet.worker import Worker
from headrace_router.metrics import RouterMetrics
from headrace_router.requests.cached import FIRST_TOKENS, Finished, cached_at
from headrace_router.requests.dispatch import Dispatcher, Placement
from headrace_router.requests.move import Move
from headrace_router.requests.sample import Sample
from headrace_router.requests.sample_state import SampleState
from headrace_router.requests.tracing import SampleTrace

log = logging.getLogger(__name__)

_DEADLINE_SLACK_S = 0.05
"""A worker's time for a sequence is up so much before the client's, by two clocks and what lies between."""
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.02, 0.5
"""Before the second attempt of a sample without a token, at most; twice as long before each that follows."""
_MOST_REFUSALS = 2
_MOST_LOST_WORKERS = 2
_LOST_REASONS = frozenset({"WORKER_LOST", "HOLDER_LOST"})


@dataclass(frozen=True, slots=True)
class _Reaction:
    """What AGAIN means for one kind of error."""

    holds_worker: bool = False
    level: int = logging.WARNING


_AGAIN: dict[type[HeadraceError], _Reaction] = {
    InvalidRequestError: _Reaction(level=logging.ERROR),
    LayoutMismatchError: _Reaction(level=logging.ERROR),
    UnauthenticatedError: _Reaction(holds_worker=True, level=logging.ERROR),
    PermissionDeniedError: _Reaction(holds_worker=True, level=logging.ERROR),
    OverloadedError: _Reaction(holds_worker=True),
    UnavailableError: _Reaction(holds_worker=True),
    HandoffLostError: _Reaction(),
    TransferCorruptError: _Reaction(level=logging.ERROR),
    ProtocolError: _Reaction(holds_worker=True, level=logging.ERROR),
    DeadlineError: _Reaction(),
}


@dataclass(slots=True)
class _Endings:
    """How the attempts of one sample ended."""

    num_refused: int = 0
    lost: set[Worker] = field(default_factory=set)
    """Those that were gone, or whose pages nobody could reach."""


class Flow:
    """Runs samples. Event loop only."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: RouterMetrics,
        *,
        max_attempts: int,
        local_below: int = 0,
        predicts_local: bool = False,
    ) -> None:
        """Take what it runs by.

        Args:
            dispatcher: places samples.
            metrics: counts.
            max_attempts: of one sample.
            local_below: `StartSequence.local_below`, at least.
            predicts_local: take what is predicted in place of that, once enough was measured.
        """
        self._predicts_local = predicts_local
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._local_below = local_below
        self._numbers = itertools.count(1)
        self._finished = Finished()

    async def run(self, sample: Sample, trace: SampleTrace, on_placed: Callable[[], None]) -> None:
        """Bring `sample` to FINISHED; cancelled, free everything it holds.

        Args:
            sample: in state QUEUED.
            trace: its.
            on_placed: called when it leaves the queue for the first time.

        Raises:
            HeadraceError: the client's error; everything is freed.
        """
        sample.number = next(self._numbers)
        if sample.cached is None:
            sample.cached = self._finished.find(sample.spec.prompt_ids)
        fingerprint = ""
        endings = _Endings()
        placed: Placement | None = None
        try:
            while True:
                placement = placed or await self._dispatcher.place(sample)
                on_placed()
                move = Move(self._dispatcher, sample, placement)
                try:
                    fingerprint = self._check_model(fingerprint, placement)
                    ended = await self._attempt(sample, trace, placement, move)
                    placed = move.make() if ended.is_moved else None
                finally:
                    await move.close()
                if placed is not None:
                    self._metrics.moves.inc()
                    trace.end_attempt(sample, is_moved=True)
                elif ended.error is None:
                    self._remember(sample, placement.decode)
                    return
                else:
                    sample.mark_failure(time.monotonic())
                    trace.end_attempt(sample, reason=ended.error.reason)
                    self._react(sample, placement, ended, ended.error, endings)
                    if pause_s := _pause_s(sample):
                        await asyncio.sleep(pause_s)
        finally:
            sample.let_go()

    async def _attempt(self, sample: Sample, trace: SampleTrace, placement: Placement, move: Move) -> Ended:
        """Make one attempt; return how it ended."""
        prefill, session = placement.prefill, placement.decode.session
        sample.begin_attempt(
            placement,
            prefill_address=prefill.address if prefill else "",
            decode=placement.decode,
            now_s=time.monotonic(),
        )
        trace.begin_attempt(sample)
        knows_end = keeps_pages = False

        def on_prefill_lost(lost: asyncio.Future[HeadraceError]) -> None:
            sample.on_prefill_lost(lost.result())

        try:
            if prefill is not None:
                prefill.lost.add_done_callback(on_prefill_lost)
            session.start(sample, self._start(sample, placement, trace), on_leaving=move.begin)
            assert sample.attempt_over is not None, "it has begun"
            ended = await sample.attempt_over
            if ended.is_moved and sample.is_over:  # it ended before it was moved
                ended = Ended(Side.ROUTER)
            knows_end = ended.by is Side.WORKER
            keeps_pages = ended.is_moved and move.has_pages
        except HeadraceError as error:
            return Ended(Side.WORKER, error)  # the session was lost before
        finally:
            if prefill is not None:
                prefill.lost.remove_done_callback(on_prefill_lost)
            session.end(sample.number, sample.attempt, tell=not knows_end, keeps_pages=keeps_pages)
        return ended

    def _start(self, sample: Sample, placement: Placement, trace: SampleTrace) -> decode_service_pb2.StartSequence:
        decode, cached = placement.decode, sample.cached
        predicted = self._dispatcher.local_below(placement) if self._predicts_local else None
        local_below = self._local_below if predicted is None else predicted
        # Of a worker that went away and came back it has them already.
        takes = sample.kept is not None and cached is not None and cached.worker is sample.kept.worker is not decode
        if takes or (
            cached is not None and cached.worker is decode
        ):  # what is left of a page is sooner computed than fetched
            local_below = max(local_below, decode.layout.page_size)
        is_scored = sample.prompt_scores.is_whole
        if not is_scored:
            local_below = MAX_COUNT  # who generates says what is probable in a prompt, too
        message = decode_service_pb2.StartSequence(
            sequence_number=sample.number,
            attempt=sample.attempt,
            request_id=sample.spec.sent_id,
            timeout_ms=max(1, round(1000 * _remaining_s(sample))),
            num_prompt_tokens=len(sample.spec.prompt_ids),
            sampling=sample.spec.sampling,
            sample_index=sample.sample_index,
            prefill_address=sample.prefill_address,
            local_below=local_below,
            traceparent=trace.traceparent,
            num_prompt_logprobs=sample.prompt_scores.num_known,
        )
        if is_scored:
            message.sampling.ClearField("prompt_logprobs")
        has_use = bool(sample.prefill_address) or takes
        if cached is not None and cached.num_tokens and not cached.is_lost and has_use:
            message.cached_prefix.address = cached.worker.address
            message.cached_prefix.incarnation = cached.worker.info.incarnation
            message.cached_prefix.num_tokens = cached.num_tokens
            message.takes_prefix = takes
        sample.spec.encoded_prompt.put(message, sample.output_ids)
        return message

    def _remember(self, sample: Sample, decode: Worker) -> None:
        """Take note of where the sample's tokens can be found, for the next turn of its conversation."""
        cached = cached_at(decode, sample.num_tokens)
        num_output = cached.num_tokens - len(sample.spec.prompt_ids)
        if num_output > 0:  # it has pages that no prefill worker ever had
            tokens_sha256 = sample.spec.encoded_prompt.sha256(sample.output_ids[:num_output])
            first_ids = [*sample.spec.prompt_ids[:FIRST_TOKENS], *sample.output_ids[:FIRST_TOKENS]]
            self._finished.remember(first_ids, tokens_sha256, cached)

    def _react(
        self, sample: Sample, placement: Placement, ended: Ended, error: HeadraceError, endings: _Endings
    ) -> None:
        """Prepare another attempt, or raise what the client is told; count in `endings` how this one ended."""
        blamed = _blamed(placement, ended)
        if ended.whose is not Whose.CHANNEL:
            self._count_failure(blamed[0], ended, error)
        is_refusal = isinstance(error, InvalidRequestError) and error.reason != "BAD_HANDOFF"
        endings.num_refused += is_refusal
        if error.reason in _LOST_REASONS:
            endings.lost.add(blamed[0])  # of two the prefill worker: of its pages it is said
        reaction = _AGAIN.get(type(error))
        is_late = isinstance(error, DeadlineError) and _remaining_s(sample) <= _DEADLINE_SLACK_S
        if is_late or (is_refusal and endings.num_refused >= _MOST_REFUSALS):
            reaction = None
        data = {
            "request_id": sample.spec.request_id,
            "sent_id": sample.spec.sent_id,
            "sample": sample.sample_index,
            "attempt": sample.attempt,
            "phase": sample.state.value,
            "worker": ",".join(worker.address for worker in blamed),
            "reason": error.reason,
            "problem": str(error),
        }
        if reaction is None:
            level = logging.INFO if isinstance(error, _CLIENT_ERRORS) else logging.ERROR
            log.log(level, "attempt failed for good", extra=data)
            raise error
        log.log(reaction.level, "attempt failed", extra=data)
        sample.avoid |= {worker.address for worker in blamed}
        if sample.cached is not None and sample.cached.worker in blamed:
            sample.cached = None
        sample.reserves_all |= error.reason == "NO_FREE_PAGES" and placement.decode in blamed
        prefill = placement.prefill
        sample.prefer = prefill.address if prefill is not None and prefill not in blamed else ""
        if reaction.holds_worker:
            for worker in blamed:
                worker.hold()
        num_failed = sample.attempt - sample.num_moves
        if num_failed >= self._max_attempts or len(endings.lost) >= _MOST_LOST_WORKERS:
            raise UnavailableError(
                "RETRIES_EXHAUSTED",
                f"{num_failed} attempts failed; the last at {data['worker']} while {sample.state.value}: "
                f"{error.reason}: {error}",
            ) from error
        self._metrics.retries.labels(label(error.reason)).inc()
        sample.move(SampleState.QUEUED)

    def _count_failure(self, worker: Worker, ended: Ended, error: HeadraceError) -> None:
        """Let a worker's circuit know of a failure that was its own, and not the request's or a matter of room."""
        is_lost = error.reason in _LOST_REASONS
        if (
            isinstance(error, _NO_FAULTS)
            or error.reason in _NO_FAULT_REASONS
            or (is_lost and worker.is_blamed_for_loss)
        ):
            return
        if ended.by is Side.ROUTER and error.reason == "BUG":  # ours
            return
        worker.is_blamed_for_loss |= is_lost
        if worker.breaker.on_failure(error.reason, time.monotonic()):
            self._metrics.circuits_opened[worker.role_name].inc()
            data = {"worker": worker.address, "reason": error.reason, "problem": str(error)}
            log.warning("circuit opened: it failed again and again", extra=data)

    def _check_model(self, fingerprint: str, placement: Placement) -> str:
        """Return the model's fingerprint; a retry on another model would continue a text that it did not write."""
        current = placement.decode.info.model_fingerprint
        if fingerprint and fingerprint != current:
            raise UnavailableError("RETRIES_EXHAUSTED", "the workers failed, and those there now serve another model")
        return current


_NO_FAULTS = (InvalidRequestError, DeadlineError, OverloadedError)
_NO_FAULT_REASONS = frozenset({"DRAINING", "STARTING", "LEASE_ENDED", "STALE_ATTEMPT", "TAKER_LOST"})
"""Of errors that say nothing against a worker: a process that goes or comes, an attempt that another one replaced."""
_CLIENT_ERRORS = (InvalidRequestError, DeadlineError)


def _pause_s(sample: Sample) -> float:
    """Return how long a sample waits before it queues again; what its client reads already, waits for nothing.

    A worker that fails has many at once: they are not to come to the next one in the same moment.
    """
    num_failed = sample.attempt - sample.num_moves
    return 0.0 if sample.output_ids else random.uniform(0.0, min(_FIRST_PAUSE_S * 2 ** (num_failed - 1), _MOST_PAUSE_S))


def _remaining_s(sample: Sample) -> float:
    return sample.spec.deadline_s - time.monotonic()


def _blamed(placement: Placement, ended: Ended) -> list[Worker]:
    """Return whose failure it was."""
    if placement.prefill is None or ended.whose is Whose.DECODE:
        return [placement.decode]
    if ended.whose is Whose.PREFILL:
        return [placement.prefill]
    return [placement.prefill, placement.decode]
