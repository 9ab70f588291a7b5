"""A caller's own trace goes on in the router's, where the caller traces with OpenTelemetry."""

from __future__ import annotations

import sys


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Return W3C's `traceparent`, and `tracestate` if there is one, of the span that the caller is in now.

    Nothing where there is none. OpenTelemetry is not loaded for it: who has a span has loaded it.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())
