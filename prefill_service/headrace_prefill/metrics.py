"""Metrics of the prefill worker; docs/metrics.md lists them."""

from __future__ import annotations

from headrace_core.telemetry import PHASE_BUCKETS
from headrace_core.worker.metrics import WorkerMetrics
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class PrefillMetrics:
    """`worker` has what every worker has."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.worker = WorkerMetrics(registry)
        self.prefill_seconds = Histogram(
            "headrace_prefill_seconds", "From a sequence's first step to its first token", buckets=PHASE_BUCKETS,
            registry=registry,
        )  # fmt: skip
        self.leases = Gauge("headrace_leases", "Sequences computed and held for a decode worker", registry=registry)
        self.lease_ends = Counter("headrace_lease_ends_total", "How leases ended", ["outcome"], registry=registry)
        for outcome in ("taken", "aborted"):
            self.lease_ends.labels(outcome)
