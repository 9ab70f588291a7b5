"""Spans that are recorded and sent to a collector: the one place that imports OpenTelemetry.

The SDK reads the usual variables (`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_BSP_*`, ...). What
ended goes into a queue that a thread of the SDK empties; one that is full, because the collector is slow or gone, drops
spans, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from headrace_core import __version__
from headrace_core.address import is_loopback
from headrace_core.errors import StartupError
from headrace_core.tracing.span import NONE, NOT_TRACED, Attributes, Kind, Span, Tracer

FLUSH_S = 1.0
"""How long a process that ends waits for its collector."""

_W3C = TraceContextTextMapPropagator()
_KINDS = {
    Kind.SERVER: trace.SpanKind.SERVER,
    Kind.CLIENT: trace.SpanKind.CLIENT,
    Kind.INTERNAL: trace.SpanKind.INTERNAL,
}
_LOOKS = 3


class OtelSpan(Span):
    """One that is recorded. `zero_ns`: when `time.monotonic()` was 0, by the wall clock; the same for all below it."""

    is_recorded = True

    def __init__(self, tracer: trace.Tracer, span: trace.Span, zero_ns: int) -> None:
        self._tracer = tracer
        self._span = span
        self._zero_ns = zero_ns
        self._is_over = False

    @property
    def traceparent(self) -> str:
        """See `Span`."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, trace.set_span_in_context(self._span, Context()))
        return carrier["traceparent"]

    @property
    def trace_id(self) -> str:
        """See `Span`."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def child(
        self,
        name: str,
        *,
        start_s: float | None = None,
        kind: Kind = Kind.INTERNAL,
        attributes: Attributes = NONE,
        after: Span | None = None,
    ) -> Span:
        """See `Span`."""
        span = self._tracer.start_span(
            name,
            trace.set_span_in_context(self._span, Context()),
            _KINDS[kind],
            attributes,
            [trace.Link(after._span.get_span_context())] if isinstance(after, OtelSpan) else None,
            self._ns(start_s),
        )
        return OtelSpan(self._tracer, span, self._zero_ns)

    def set(self, attributes: Attributes) -> None:
        """See `Span`."""
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes = NONE) -> None:
        """See `Span`."""
        self._span.add_event(name, attributes, self._ns(None))

    def fail(self, reason: str) -> None:
        """See `Span`."""
        self._span.set_attribute("error.type", reason)
        self._span.set_status(trace.StatusCode.ERROR, reason)

    def end(self, at_s: float | None = None) -> None:
        """See `Span`."""
        if not self._is_over:
            self._is_over = True
            self._span.end(self._ns(at_s))

    def _ns(self, at_s: float | None) -> int:
        return self._zero_ns + (time.monotonic_ns() if at_s is None else 1000 * round(at_s * 1e6))


class OtelTracer(Tracer):
    """Samples a share of the requests that bring no trace of their own; sends what is recorded until `close`."""

    def __init__(self, sample: float, role: str) -> None:
        """Args: `sample` is that share, from 0 to 1.

        Raises:
            StartupError: BAD_TRACING, the variables say what can't be.
        """
        about = {
            "service.namespace": "headrace",
            "service.name": f"headrace-{role}",
            "service.version": __version__,
            "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
        }
        try:
            resource = Resource.create().merge(Resource(about)).merge(OTELResourceDetector().detect())
            sampler = ParentBased(TraceIdRatioBased(sample))
            self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(channel_options=_channel_options())))
        except (ValueError, TypeError, OSError) as error:
            raise StartupError("BAD_TRACING", f"a variable of OpenTelemetry (OTEL_*) can't be used: {error}") from error
        self._tracer = self._provider.get_tracer("headrace", __version__)

    def begin(
        self, name: str, metadata: Iterable[tuple[str, str | bytes]], *, start_s: float, attributes: Attributes = NONE
    ) -> Span:
        """See `Tracer`."""
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        context = _W3C.extract(carrier, Context())
        return self._start(name, context, attributes, 1000 * round(start_s * 1e6))

    def join(self, name: str, traceparent: str, attributes: Attributes = NONE) -> Span:
        """See `Tracer`."""
        context = _W3C.extract({"traceparent": traceparent}, Context()) if traceparent else Context()
        if not trace.get_current_span(context).get_span_context().trace_flags.sampled:
            return NOT_TRACED
        return self._start(name, context, attributes, time.monotonic_ns())

    async def close(self) -> None:
        """See `Tracer`: for `FLUSH_S`."""
        loop = asyncio.get_running_loop()
        is_closed = loop.create_future()

        def close() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop was closed: it came too late
                loop.call_soon_threadsafe(lambda: is_closed.done() or is_closed.set_result(None))

        # A daemon, because the threads of an executor are waited for at the end.
        threading.Thread(target=close, name="last spans", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(is_closed, FLUSH_S)

    def _start(self, name: str, context: Context, attributes: Attributes, at_ns: int) -> Span:
        zero_ns = _zero_ns()
        span = self._tracer.start_span(name, context, trace.SpanKind.SERVER, attributes, None, zero_ns + at_ns)
        return OtelSpan(self._tracer, span, zero_ns) if span.is_recording() else NOT_TRACED


def _channel_options() -> Any:
    """Return what keeps gRPC from going to a collector on this machine by a proxy that the environment names."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    endpoint = next(filter(None, map(os.environ.get, names)), "//localhost")
    host = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname or ""
    is_near = is_loopback(f"[{host}]:1" if ":" in host else f"{host}:1")
    return (("grpc.enable_http_proxy", 0),) if is_near else None


def _zero_ns() -> int:
    """Return when `time.monotonic()` was 0 by the wall clock, which may be set; of some looks the least interrupted."""
    return min(_look() for _ in range(_LOOKS))[1]


def _look() -> tuple[int, int]:
    before_ns = time.monotonic_ns()
    now_ns = time.time_ns()
    return time.monotonic_ns() - before_ns, now_ns - before_ns
