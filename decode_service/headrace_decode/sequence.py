"""One sequence at a decode worker: what is known of it, and how its router is told."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from headrace.v1 import decode_service_pb2 as pb
from headrace_core.batch.spec import SequenceSpec
from headrace_core.errors import DeadlineError, HeadraceError, InvalidRequestError
from headrace_core.request import PromptLogprobs, hash_tokens
from headrace_core.tracing.stages import Stages
from headrace_core.transfer.hold import Side
from headrace_core.transfer.taker import TransferStats
from headrace_core.transfer.values import Admission, CachedPrefix, FirstToken, Order, decode_cached, timeout_s
from headrace_core.wire import (
    decode_sampling,
    encode_failure,
    encode_finish,
    encode_logprobs,
    encode_prompt_logprobs,
)
from headrace_core.worker.loading import LoadedModel

from headrace_decode.events import Output, Started
from headrace_decode.session import Session

_SIDES = {
    Side.TAKER: pb.FAILURE_SIDE_DECODE,
    Side.HOLDER: pb.FAILURE_SIDE_PREFILL,
    Side.CHANNEL: pb.FAILURE_SIDE_CHANNEL,
}

_SCORED_BYTES, _LOGPROB_BYTES = 32 << 10, 9
"""Of an entry with log-probabilities of a prompt, at most, and of each: so that no part of them takes a router long."""


def decode_spec(message: pb.StartSequence) -> SequenceSpec:
    """Return what is to be computed; it is checked by whoever knows the model.

    Raises:
        InvalidRequestError: BAD_REQUEST, BAD_SAMPLING.
    """
    if not message.timeout_ms:
        raise InvalidRequestError("BAD_REQUEST", "timeout_ms is 0: the sequence has no time")
    return SequenceSpec(
        request_id=message.request_id,
        attempt=message.attempt,
        sample_index=message.sample_index,
        token_ids=list(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        params=decode_sampling(message.sampling),
        num_prompt_logprobs=message.num_prompt_logprobs,
    )


def refuse(session: Session, message: pb.StartSequence, error: HeadraceError) -> None:
    """Tell the router that a sequence does not even begin."""
    failure = encode_failure(error, pb.FAILURE_SIDE_DECODE)
    session.put(message.sequence_number, message.attempt, len(message.token_ids), failure=failure)


@dataclass(slots=True, eq=False)
class Sequence:
    """One that began. `key` names it in the scheduler, `number` in its session."""

    key: int
    number: int
    session: Session
    spec: SequenceSpec
    prefill_address: str
    began_s: float
    ends_s: float
    position: int
    """Tokens that the router knows of."""
    trace: Stages
    cached: CachedPrefix | None = None
    takes_prefix: bool = False
    """True if `cached` is for this worker, not for the one that computes the rest."""
    deadline: asyncio.TimerHandle | None = None
    queue_s: float = 0.0
    taking: asyncio.Task[TransferStats | None] | None = None
    first_token_id: int = 0
    moved: TransferStats | None = None
    num_output_tokens: int = 0
    num_preemptions: int = 0
    has_joined: bool = False
    is_aside: bool = False
    """True if it goes on elsewhere, and its pages are kept for who takes them: nothing more is told of it."""
    is_over: bool = False

    @staticmethod
    def begin(
        key: int, session: Session, spec: SequenceSpec, message: pb.StartSequence, trace: Stages, now_s: float
    ) -> Sequence:
        """Return what `message` starts now."""
        return Sequence(
            key,
            message.sequence_number,
            session,
            spec,
            message.prefill_address,
            now_s,
            now_s + timeout_s(message.timeout_ms),
            len(spec.token_ids),
            trace,
            cached=decode_cached(message),
            takes_prefix=message.takes_prefix,
        )

    def order(self, model: LoadedModel, num_have_tokens: int, cached: CachedPrefix | None) -> Order:
        """Return what is asked of a holder that is to know of `cached`, when the first `num_have_tokens` are here."""
        return Order(
            owner=(self.session.router_id, self.number),
            spec=self.spec,
            timeout_s=max(self.ends_s - time.monotonic(), 0.001),
            tokens_sha256=hash_tokens(self.spec.token_ids),
            fingerprint=model.fingerprint,
            layout=model.layout,
            num_have_tokens=num_have_tokens,
            cached=cached,
            traceparent=self.trace.traceparent,
        )

    def late(self) -> DeadlineError:
        """Return what it ends with when its time is up."""
        return DeadlineError("DEADLINE_EXCEEDED", f"request {self.spec.request_id}: the sequence's time is up")

    def tell_first(self, admission: Admission, first: FirstToken) -> None:
        """Tell of the token that was computed elsewhere."""
        logprobs = first.token.logprobs
        self.trace.event("first_token")
        self._tell(
            prefilled=pb.Prefilled(
                token_id=first.token.token_id,
                logprobs=encode_logprobs(logprobs) if logprobs else None,
                tokens_sha256=first.tokens_sha256,
                num_cached_tokens=admission.num_cached_tokens,
                decode_queue_us=_us(self.queue_s),
                prefill_queue_us=_us(admission.queue_s),
                prefill_us=_us(first.compute_s),
                finish_reason=encode_finish(first.finish),
            )
        )
        self.first_token_id = first.token.token_id
        self.position += 1

    def tell_joined(self, started: Started) -> None:
        """Tell that it runs."""
        moved = self.moved
        self.trace.next("running")
        self._tell(
            joined=pb.Joined(
                queue_us=0 if self.taking else _us(started.queue_s),
                num_cached_tokens=started.num_cached_tokens,
                transfer_us=_us(moved.duration_s) if moved else 0,
                transfer_bytes=moved.num_bytes if moved else 0,
                num_transfer_pages=moved.num_pages if moved else 0,
                transport=moved.transport if moved else "",
                hidden_transfer_us=_us(moved.hidden_s) if moved else 0,
                hidden_transfer_bytes=moved.num_hidden_bytes if moved else 0,
            )
        )

    def tell_scored(self, logprobs: PromptLogprobs) -> None:
        """Tell what is known of its prompt."""
        per_token = _LOGPROB_BYTES * (1 + logprobs.num_top)
        for part in logprobs.parts(_SCORED_BYTES // per_token):
            self._tell(prompt_logprobs=encode_prompt_logprobs(part))

    def tell_output(self, output: Output) -> None:
        """Tell of its next token."""
        self.session.put_token(self.number, self.spec.attempt, self.position, output.token, output.finish)
        self.num_output_tokens += 1
        self.position += 1

    def tell_failure(self, error: HeadraceError, side: Side) -> None:
        """Tell why it can't go on."""
        self._tell(failure=encode_failure(error, _SIDES[side]))

    def close(self, error: HeadraceError | None) -> None:
        """Be over."""
        self.is_over = True
        if self.deadline is not None:
            self.deadline.cancel()
        if self.trace.span.is_recorded:
            report = self.report(error)
            self.trace.end(report.pop("reason"), {f"headrace.{name}": value for name, value in report.items()})

    def report(self, error: HeadraceError | None) -> dict[str, Any]:
        """Return what is logged of it at its end."""
        moved = self.moved
        return {
            "request_id": self.spec.request_id,
            "sample": self.spec.sample_index,
            "attempt": self.spec.attempt,
            "context_tokens": len(self.spec.token_ids),
            "output_tokens": self.num_output_tokens,
            "seconds": time.monotonic() - self.began_s,
            "transfer_s": moved.duration_s if moved else 0.0,
            "hidden_transfer_s": moved.hidden_s if moved else 0.0,
            "pages": moved.num_pages if moved else 0,
            "bytes": moved.num_bytes if moved else 0,
            "preemptions": self.num_preemptions,
            "reason": error.reason if error else "",
        }

    def _tell(self, **event: Any) -> None:
        self.session.put(self.number, self.spec.attempt, self.position, **event)


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
