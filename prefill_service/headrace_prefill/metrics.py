"""Metrics of the prefill worker; docs/metrics.md lists them."""

from __future__ import annotations

from headrace_core.telemetry import PHASE_BUCKETS
from headrace_core.worker.metrics import WorkerMetrics
from prometheus_client import CollectorRegistry, Histogram


class PrefillMetrics:
    """`worker` has what every worker has."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.worker = WorkerMetrics(registry)
        self.prefill_seconds = Histogram(
            "headrace_prefill_seconds", "From a sequence's first step to its first token", buckets=PHASE_BUCKETS,
            registry=registry,
        )  # fmt: skip
