"""Metrics of the decode worker; docs/metrics.md lists them."""

from __future__ import annotations

from headrace_core.telemetry import PHASE_BUCKETS
from headrace_core.worker.metrics import WorkerMetrics
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class DecodeMetrics:
    """`worker` has what every worker has."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.worker = WorkerMetrics(registry)
        self.transfer_seconds = Histogram(
            "headrace_transfer_seconds", "Moving and verifying one sequence's pages", ["transport"],
            buckets=PHASE_BUCKETS, registry=registry,
        )  # fmt: skip
        self.preemptions = Counter(
            "headrace_preemptions_total", "Sequences evicted to be computed again", registry=registry
        )
        self.paused_sessions = Gauge(
            "headrace_paused_sessions", "Sessions whose rows pause until their reader reads", registry=registry
        )
        self.slow_readers = Counter(
            "headrace_slow_readers_total", "Sessions aborted because their reader stalled", registry=registry
        )
