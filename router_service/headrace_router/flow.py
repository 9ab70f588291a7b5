"""The life of one sample, from the queue to its last token, and what is done about every failure on the way.

`sample.py` draws the states; this file moves them. One attempt is

    place ──► Prefill ──► first token to the client ──► Start with the ticket ──► step outputs ──► finished

and colocated: place ──► Start without a ticket ──► step outputs. Whatever ends an attempt, both legs are told: a ticket
that no decode worker took is released at its holder, a sequence is cancelled at its decode worker unless that worker
ended it, a call under way is cancelled with the task that awaits it, or when its worker's link is lost, and a
cancelled Prefill is withdrawn besides.

Reactions to a worker's error (`errors.py` has the tree); AGAIN means: a new attempt with the prompt and every token so
far, other workers preferred, at most `max_attempts` in all, then RETRIES_EXHAUSTED with the last cause. A worker knows
no more of a request than the router, which has checked it: what one worker makes of it is not final.

    InvalidRequestError   AGAIN, logged as an error; the second one of a sample: to the client.
                          But BAD_HANDOFF, which is between workers: AGAIN, as often as anything
    NotFoundError         AGAIN (UNKNOWN_SESSION: the session went away under the call)
    LayoutMismatchError   AGAIN, logged as an error
    OverloadedError       AGAIN; the worker gets nothing before its next load report
    UnavailableError      AGAIN; the same. But WORKER_LOST, the second one of a sample: RETRIES_EXHAUSTED, for it may
                          be the request that ends its workers, and they have others'
    HandoffLostError      AGAIN
    TransferCorruptError  AGAIN, logged as an error
    ProtocolError         AGAIN, logged as an error; the worker gets nothing before its next load report
    DeadlineError         AGAIN while the client's own time is not up; then to the client
    anything else         to the client, logged as an error
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from headrace.v1 import decode_service_pb2, prefill_service_pb2, transfer_service_pb2, types_pb2
from headrace_core.errors import (
    DeadlineError,
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    LayoutMismatchError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    TransferCorruptError,
    UnavailableError,
)
from headrace_core.reasons import label
from headrace_core.rpc import answered, raised_from
from headrace_core.wire import decode_finish

from headrace_router.answers import check_prefilled, check_started
from headrace_router.dispatch import Dispatcher, Placement
from headrace_router.metrics import RouterMetrics
from headrace_router.sample import Sample, SampleState
from headrace_router.session import Ended, Side, Watch
from headrace_router.worker import Worker

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_CLEANUP_TIMEOUT_S = 5.0
_LATE_ANSWER_S = 5.0
_DEADLINE_SLACK_S = 0.05
"""A call's time is up so much before the client's, by two clocks and what lies between."""
_MOST_REFUSALS = 2
_MOST_LOST_WORKERS = 2
_REFUSED = "refused by a worker"
_HOLDER_REASONS = frozenset({"HOLDER_LOST", "LEASE_EXPIRED", "WORKER_RESTARTED", "STALE_PAGE"})
"""Reasons by which a decode worker blames the prefill worker."""


@dataclass(frozen=True, slots=True)
class _Reaction:
    """What AGAIN means for one kind of error."""

    holds_worker: bool = False
    level: int = logging.WARNING


_AGAIN: dict[type[HeadraceError], _Reaction] = {
    InvalidRequestError: _Reaction(level=logging.ERROR),
    NotFoundError: _Reaction(holds_worker=True),
    LayoutMismatchError: _Reaction(level=logging.ERROR),
    OverloadedError: _Reaction(holds_worker=True),
    UnavailableError: _Reaction(holds_worker=True),
    HandoffLostError: _Reaction(),
    TransferCorruptError: _Reaction(level=logging.ERROR),
    ProtocolError: _Reaction(holds_worker=True, level=logging.ERROR),
    DeadlineError: _Reaction(),
}


class Flow:
    """Runs samples. Event loop only."""

    def __init__(self, dispatcher: Dispatcher, metrics: RouterMetrics, *, max_attempts: int) -> None:
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._cleanups: set[asyncio.Task[None]] = set()

    async def run(self, sample: Sample, on_placed: Callable[[], None]) -> None:
        """Bring `sample` to FINISHED; cancelled, free everything it holds.

        Args:
            sample: in state QUEUED.
            on_placed: called when it leaves the queue for the first time.

        Raises:
            HeadraceError: the client's error; everything is freed.
        """
        fingerprint = ""
        reasons: Counter[str] = Counter()
        while True:
            placement = await self._dispatcher.place(sample)
            on_placed()
            try:
                fingerprint = self._check_model(fingerprint, placement)
                failure = await self._attempt(sample, placement)
            finally:
                placement.release()
                self._dispatcher.kick()
            if failure is None:
                return
            self._react(sample, placement, failure, reasons)

    async def close(self) -> None:
        """Wait for releases and cancellations under way."""
        if self._cleanups:
            await asyncio.wait(self._cleanups, timeout=_CLEANUP_TIMEOUT_S)

    async def _attempt(self, sample: Sample, placement: Placement) -> HeadraceError | None:
        """Make one attempt; return why it failed, or None when the sample is finished."""
        sample.begin_attempt(
            prefill_address=placement.prefill.address if placement.prefill else "",
            decode_address=placement.decode.address,
            now_s=time.monotonic(),
        )
        try:
            handoff = await self._prefill(sample, placement, placement.prefill) if placement.prefill else None
            if sample.state is not SampleState.FINISHED:
                await self._decode(sample, placement, handoff)
        except HeadraceError as error:
            return error
        return None

    async def _prefill(self, sample: Sample, placement: Placement, worker: Worker) -> types_pb2.Handoff:
        """Compute the prompt, take the first token, return the ticket; its pages are ours to release until Start."""
        request = prefill_service_pb2.PrefillRequest(
            request_id=sample.spec.sent_id,
            attempt=sample.attempt,
            num_prompt_tokens=len(sample.spec.prompt_ids),
            sampling=sample.spec.sampling,
            sample_index=sample.sample_index,
        )
        prompt, output_ids = sample.spec.encoded_prompt, list(sample.output_ids)
        prompt.put(request, output_ids)
        watch = Watch()
        number = worker.session.add(watch)
        try:
            response = await _answer(worker.prefill.Prefill(request, timeout=_remaining_s(sample)), watch.over)
        except (asyncio.CancelledError, HeadraceError):
            self._spawn(_withdraw(worker, request))
            raise
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._spawn(_withdraw(worker, request))
            raise _cause(error) from error
        finally:
            worker.session.remove(number)
        try:
            response = answered(response)
            check_prefilled(response, request, prompt.sha256(output_ids), worker.info)
        except HeadraceError:
            # The ticket may be somebody else's: what it names is not ours to release, what our attempt holds is.
            self._spawn(_withdraw(worker, request))
            raise
        placement.on_prefilled()
        is_wanted = False
        try:
            _take_prefilled(sample, response)
            is_wanted = sample.state is not SampleState.FINISHED
        finally:
            if not is_wanted and response.handoff.lease.lease_id:
                self._spawn(_release(worker, response.handoff))
        self._dispatcher.kick()
        return response.handoff

    async def _decode(self, sample: Sample, placement: Placement, handoff: types_pb2.Handoff | None) -> None:
        """Start the sequence and follow it to its end; the ticket is the decode worker's once it answered."""
        worker = placement.decode
        sample.state = SampleState.STARTING
        sample.attempt_over = asyncio.get_running_loop().create_future()
        number = 0
        may_hold = True
        ended: Ended | None = None
        try:
            number = worker.session.add(sample)
            request = _start_request(sample, worker.session.session_id, number, handoff)
            call = worker.decode.Start(request, timeout=_remaining_s(sample))
            response = answered(await _answer(call, sample.attempt_over))
            may_hold = False
            check_started(response, worker.info, worker.layout)
            placement.on_started()
            if not sample.is_over:
                sample.state = SampleState.DECODING
            sample.on_started(response, time.monotonic())
            ended = await sample.attempt_over
            if ended.error is not None:
                raise ended.error
        except HeadraceError:
            if not sample.has_ended:
                raise
            sample.on_started(decode_service_pb2.StartResponse(), time.monotonic())
        except grpc.aio.AioRpcError as error:
            if not sample.has_ended:
                raise _cause(error) from error
            sample.on_started(decode_service_pb2.StartResponse(), time.monotonic())
        finally:
            worker.session.remove(number)
            if may_hold and handoff is not None and placement.prefill is not None:
                self._spawn(_release(placement.prefill, handoff))
            if number and (ended is None or ended.by is not Side.WORKER):
                self._spawn(_cancel(worker, number))

    def _react(self, sample: Sample, placement: Placement, error: HeadraceError, reasons: Counter[str]) -> None:
        """Prepare another attempt, or raise what the client is told; count in `reasons` how this one ended."""
        blamed = _blamed(sample, placement, error)
        sample.mark_failure(time.monotonic())
        is_refusal = isinstance(error, InvalidRequestError) and error.reason != "BAD_HANDOFF"
        kind = _REFUSED if is_refusal else error.reason
        reasons[kind] += 1
        reaction = _AGAIN.get(type(error))
        is_final = is_refusal and reasons[kind] >= _MOST_REFUSALS
        if is_final or (isinstance(error, DeadlineError) and _remaining_s(sample) <= _DEADLINE_SLACK_S):
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
        sample.reserves_all |= error.reason == "NO_FREE_PAGES" and placement.decode in blamed
        if reaction.holds_worker:
            for worker in blamed:
                worker.hold()
        if sample.attempt >= self._max_attempts or reasons["WORKER_LOST"] >= _MOST_LOST_WORKERS:
            raise UnavailableError(
                "RETRIES_EXHAUSTED",
                f"{sample.attempt} attempts failed; the last at {data['worker']} while {sample.state.value}: "
                f"{error.reason}: {error}",
            ) from error
        self._metrics.retries.labels(label(error.reason)).inc()
        sample.state = SampleState.QUEUED

    def _check_model(self, fingerprint: str, placement: Placement) -> str:
        """Return the model's fingerprint; a retry on another model would continue a text that it did not write."""
        current = placement.decode.info.model_fingerprint
        if fingerprint and fingerprint != current:
            raise UnavailableError("RETRIES_EXHAUSTED", "the workers failed, and those there now serve another model")
        return current

    def _spawn(self, cleanup: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(cleanup)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)


_CLIENT_ERRORS = (InvalidRequestError, DeadlineError)


def _take_prefilled(sample: Sample, response: prefill_service_pb2.PrefillResponse) -> None:
    """Give the sample its first token and the time it took."""
    now_s = time.monotonic()
    parts = (("prefill_queue", response.queue_us), ("prefill", response.compute_us))
    sample.waterfall.split(parts, "prefill_rpc", now_s)
    sample.num_cached_tokens = response.num_cached_tokens
    sample.on_prefilled(response.handoff, decode_finish(response.finish_reason), now_s)


def _start_request(
    sample: Sample, session_id: str, number: int, handoff: types_pb2.Handoff | None
) -> decode_service_pb2.StartRequest:
    request = decode_service_pb2.StartRequest(
        session_id=session_id,
        sequence_number=number,
        request_id=sample.spec.sent_id,
        attempt=sample.attempt,
        num_prompt_tokens=len(sample.spec.prompt_ids),
        sampling=sample.spec.sampling,
        sample_index=sample.sample_index,
        handoff=handoff,
    )
    # The handoff's first token is in the sample already, but not in the pages: it is not sent.
    output_ids = sample.output_ids if handoff is None else sample.output_ids[:-1]
    sample.spec.encoded_prompt.put(request, output_ids)
    return request


def _remaining_s(sample: Sample) -> float:
    return max(0.001, sample.spec.deadline_s - time.monotonic())


async def _answer(call: grpc.aio.UnaryUnaryCall[Any, _T], over: asyncio.Future[Ended]) -> _T:
    """Return a call's answer, or raise why the run that it belongs to is over, whichever is first.

    A channel may go on though nothing more comes of the worker: its link was refused, or its session ended. When the
    run is over because it has all its tokens, the answer only brings figures, and is waited for a little.
    """
    answer = asyncio.ensure_future(call)
    try:
        await asyncio.wait((answer, over), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done() and over.result().error is None:
            await asyncio.wait((answer,), timeout=_LATE_ANSWER_S)
        if answer.done():
            return answer.result()
        raise over.result().error or UnavailableError("WORKER_LOST", "the worker finished and did not answer")
    finally:
        answer.cancel()
        call.cancel()


def _cause(error: grpc.aio.AioRpcError) -> HeadraceError:
    """Return what a call's end amounts to; one that no handler of ours raised means that the worker is gone."""
    cause = raised_from(error)
    is_transport = cause.reason == error.code().name
    if is_transport and error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError("WORKER_LOST", str(cause))
    return cause


def _blamed(sample: Sample, placement: Placement, error: HeadraceError) -> list[Worker]:
    if placement.prefill is None:
        return [placement.decode]
    if sample.state is SampleState.PREFILLING or error.reason in _HOLDER_REASONS:
        return [placement.prefill]
    if isinstance(error, TransferCorruptError | LayoutMismatchError):
        return [placement.prefill, placement.decode]
    return [placement.decode]


async def _release(holder: Worker, handoff: types_pb2.Handoff) -> None:
    """Tell the holder that nobody takes the pages; if it can't be told, the lease runs out."""
    request = transfer_service_pb2.ReleaseLeaseRequest(
        lease_id=handoff.lease.lease_id, holder_incarnation=handoff.holder_incarnation
    )
    try:
        await holder.transfer.ReleaseLease(request, timeout=_CLEANUP_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        log.debug("can't release a lease", extra={"worker": holder.address, "problem": error.details()})


async def _withdraw(worker: Worker, request: prefill_service_pb2.PrefillRequest) -> None:
    """Free what a cancelled Prefill may hold: its answer, lease and all, may have crossed the cancellation."""
    cancel = prefill_service_pb2.CancelPrefillRequest(
        request_id=request.request_id, attempt=request.attempt, sample_index=request.sample_index
    )
    try:
        await worker.prefill.CancelPrefill(cancel, timeout=_CLEANUP_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        log.debug("can't withdraw a prefill", extra={"worker": worker.address, "problem": error.details()})


async def _cancel(worker: Worker, number: int) -> None:
    """Tell the decode worker to drop a sequence; if it can't be told, the session's end does it."""
    request = decode_service_pb2.CancelRequest(session_id=worker.session.session_id, sequence_number=number)
    try:
        await worker.decode.Cancel(request, timeout=_CLEANUP_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        log.debug("can't cancel a sequence", extra={"worker": worker.address, "problem": error.details()})
