"""A request's trace at the router: its spans, and how each part of a sample's waterfall becomes one.

    request ─┬─ tokenize
             ├─ attempt ─┬─ queue, decode_queue, ... : the phases of `timings.py`, without gaps
             │           └─ what the decode worker adds, and below that the prefill worker
             └─ attempt, linked to the one that it goes on from

The phases are told when an attempt ends, from what was marked anyway: a trace costs nothing for each token, and its
phases sum to the waterfall. Names are those of OpenTelemetry's conventions for generative AI; our own begin with
`headrace.`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from headrace.v1 import generation_service_pb2
from headrace_core.errors import HeadraceError
from headrace_core.tracing.span import NOT_TRACED, Kind, Span, Tracer

from headrace_router.requests.admission import RequestSpec
from headrace_router.requests.sample import Sample
from headrace_router.requests.sample_state import SampleState
from headrace_router.timings import Waterfall

Metadata = Iterable[tuple[str, str | bytes]]
"""A call's."""


def begin_request(
    tracer: Tracer,
    message: generation_service_pb2.GenerateRequest,
    metadata: Metadata,
    *,
    model: str,
    arrival_s: float,
) -> Span:
    """Begin a request's span, in its client's trace if that is sampled; nothing of its text is in it."""
    operation = "chat" if message.WhichOneof("input") == "chat" else "text_completion"
    about = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "headrace",
        "gen_ai.request.model": model,
    }
    return tracer.begin(f"{operation} {model}", metadata, start_s=arrival_s, attributes=about)


def end_request(
    span: Span, spec: RequestSpec, samples: Sequence[Sample], *, outcome: str, error: HeadraceError | None
) -> None:
    """End a request's span with what was asked for and what came of it."""
    if not span.is_recorded:
        return
    params, first = spec.params, samples[0]
    span.set(
        {
            "gen_ai.response.id": spec.request_id,
            "gen_ai.request.max_tokens": params.max_tokens or 0,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.choice.count": spec.num_samples,
            "gen_ai.usage.input_tokens": len(spec.prompt_ids),
            "gen_ai.usage.output_tokens": sum(len(sample.output_ids) for sample in samples),
            "gen_ai.usage.cache_read.input_tokens": first.num_cached_tokens,
            "gen_ai.response.finish_reasons": [
                sample.finish_reason.name.lower() for sample in samples if sample.finish_reason
            ],
            "headrace.sent_id": spec.sent_id,
            "headrace.outcome": outcome,
        }
    )
    if first.first_token_s is not None:
        span.set({"gen_ai.server.time_to_first_token": first.first_token_s - spec.arrival_s})
    if error is not None:
        span.fail(error.reason)
    span.end()


class SampleTrace:
    """One sample's part of its request's trace. Event loop only."""

    def __init__(self, request: Span, waterfall: Waterfall, arrival_s: float, sample_index: int) -> None:
        """Args: `waterfall` is the sample's, to be read, which begins at `arrival_s` and has its first phase."""
        self._request = request
        self._waterfall = waterfall
        self._arrival_us = round(arrival_s * 1e6)
        self._sample_index = sample_index
        self._attempt: Span | None = None
        self._earlier: Span | None = None
        """The attempt that the next one goes on from."""
        self._num_told = 0
        """Phases of the waterfall that are spans."""
        self._told_us = 0
        """Where the last of them ends, from arrival."""
        if request.is_recorded:
            self._tell(NOT_TRACED if sample_index else request)  # how long it took until it was tokenized: once

    @property
    def traceparent(self) -> str:
        """For the attempt's decode worker."""
        return self._attempt.traceparent if self._attempt is not None else ""

    def begin_attempt(self, sample: Sample) -> None:
        """Begin an attempt, whose time in the queue was marked just now."""
        if not self._request.is_recorded:
            return
        about = {
            "headrace.sample": self._sample_index,
            "headrace.attempt": sample.attempt,
            "headrace.prefill_worker": sample.prefill_address,
            "headrace.decode_worker": sample.decode_address,
        }
        self._attempt = self._request.child(
            "attempt", start_s=self._told_s, kind=Kind.CLIENT, attributes=about, after=self._earlier
        )

    def end_attempt(self, sample: Sample, *, reason: str = "", is_moved: bool = False, is_cut: bool = False) -> None:
        """End the attempt, if there is one, at its last mark, or now if it `is_cut`; with `reason` it failed."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        while self._num_told < len(self._waterfall.phases):
            self._tell(attempt)
        end_s = self._told_s
        if is_cut:
            end_s = time.monotonic()
            attempt.child("unfinished", start_s=self._told_s).end(end_s)
        attempt.set(
            {
                "headrace.transport": sample.transport,
                "headrace.transfer_bytes": sample.transfer_bytes,
                "headrace.hidden_transfer_s": self._waterfall.hidden_us / 1e6,
                "headrace.is_moved": is_moved,
            }
        )
        if reason:
            attempt.fail(reason)
            self._request.event("attempt failed", {"error.type": reason, "headrace.attempt": sample.attempt})
        attempt.end(end_s)
        self._earlier = attempt

    def close(self, sample: Sample) -> None:
        """End what is left, and tell where a sample that is not finished has been since its last phase."""
        if self._attempt is not None:
            self.end_attempt(sample, is_cut=sample.state is not SampleState.FINISHED)
        elif sample.state in (SampleState.QUEUED, SampleState.FAILED):
            self._request.child("queue", start_s=self._told_s).end()

    @property
    def _told_s(self) -> float:
        return (self._arrival_us + self._told_us) / 1e6

    def _tell(self, parent: Span) -> None:
        phase = self._waterfall.phases[self._num_told]
        span = parent.child(phase.name, start_s=self._told_s)
        self._num_told += 1
        self._told_us += phase.duration_us
        span.end(self._told_s)
