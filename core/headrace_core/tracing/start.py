"""Where a process chooses whether it traces: OpenTelemetry is loaded if it does, and not otherwise."""

from __future__ import annotations

from headrace_core.errors import StartupError
from headrace_core.tracing.span import Tracer


def open_tracer(sample: float | None, role: str) -> Tracer:
    """Return the process' tracer; `close` must follow.

    Args:
        sample: share of the requests without a trace of their own that get one; None: no tracing.
        role: `router`, `prefill`, `decode` or `both`.

    Raises:
        StartupError: NO_OPENTELEMETRY, it is not installed; BAD_TRACING, its variables can't be used.
    """
    if sample is None:
        return Tracer()
    try:
        from headrace_core.tracing.otel import OtelTracer
    except ImportError as error:
        problem = "--trace-sample needs OpenTelemetry, which is not installed: pip install 'headrace[tracing]'"
        raise StartupError("NO_OPENTELEMETRY", problem) from error
    return OtelTracer(sample, role)
