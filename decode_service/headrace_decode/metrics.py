"""Metrics of the decode worker; docs/metrics.md lists them."""

from __future__ import annotations

from headrace_core.engine.engine import StepReport
from headrace_core.telemetry import PHASE_BUCKETS
from headrace_core.transfer.taker import TransferStats
from headrace_core.worker.metrics import WorkerMetrics
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class DecodeMetrics:
    """`worker` has what every worker has."""

    def __init__(self, registry: CollectorRegistry, draft_method: str = "lookup") -> None:
        """Args: `draft_method`: who guesses, as `Speculation` has it."""
        self.worker = WorkerMetrics(registry)
        self.transfer_seconds = Histogram(
            "headrace_transfer_seconds", "What was left to move after a sequence's first token", ["transport"],
            buckets=PHASE_BUCKETS, registry=registry,
        )  # fmt: skip
        self.handoffs = Gauge(
            "headrace_handoffs", "Sequences ordered from a holder and not yet here", registry=registry
        )
        self.transfer_wait_seconds = Histogram(
            "headrace_transfer_wait_seconds", "What one sequence's runs waited for their turn", ["transport"],
            buckets=PHASE_BUCKETS, registry=registry,
        )  # fmt: skip
        self.transfer_busy_seconds = Counter(
            "headrace_transfer_busy_seconds_total", "Moving and verifying, summed over runs", ["transport"],
            registry=registry,
        )  # fmt: skip
        self.hidden_transfer_seconds = Histogram(
            "headrace_hidden_transfer_seconds", "Moving pages while their prompt was computed", ["transport"],
            buckets=PHASE_BUCKETS, registry=registry,
        )  # fmt: skip
        self.hidden_transfer_bytes = Counter(
            "headrace_hidden_transfer_bytes_total", "Page bytes received while their prompts were computed",
            ["transport"], registry=registry,
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

        draft_tokens = Counter(
            "headrace_draft_tokens_total", "Tokens that were guessed and checked in a step", ["method", "outcome"],
            registry=registry,
        )  # fmt: skip
        self._accepted, self._rejected = (
            draft_tokens.labels(draft_method, outcome) for outcome in ("accepted", "rejected")
        )
        self._drafts = Counter(
            "headrace_drafts_total", "Sequences' shares of steps that had a draft", ["method"], registry=registry
        ).labels(draft_method)

    def observe_step(self, report: StepReport) -> None:
        """Count what became of a step's drafts."""
        if report.num_drafted:
            self._drafts.inc(report.num_drafts)
            self._accepted.inc(report.num_accepted)
            self._rejected.inc(report.num_drafted - report.num_accepted)

    def observe_transfer(self, moved: TransferStats) -> None:
        """Count a hand-off whose pages are here: what it moved, and when."""
        transport = moved.transport
        self.transfer_seconds.labels(transport).observe(moved.duration_s)
        self.transfer_wait_seconds.labels(transport).observe(moved.wait_s)
        self.transfer_busy_seconds.labels(transport).inc(moved.move_s)
        self.hidden_transfer_seconds.labels(transport).observe(moved.hidden_s)
        self.hidden_transfer_bytes.labels(transport).inc(moved.num_hidden_bytes)
