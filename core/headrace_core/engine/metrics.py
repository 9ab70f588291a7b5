"""Metrics that every worker has, on its own registry. Seconds, bytes, tokens; docs/metrics.md lists them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from headrace_core.engine.engine import Load, StepReport
from headrace_core.kv.page_pool import PageState
from headrace_core.telemetry import LATENCY_BUCKETS, PHASE_BUCKETS


class WorkerMetrics:
    """The metric objects of one worker process. Every label value that is known is there from the first scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.kv_pages = Gauge("headrace_kv_pages", "Pages of the pool", ["state"], registry=registry)
        self.running = Gauge("headrace_running_sequences", "Sequences computed in steps", registry=registry)
        self.waiting = Gauge("headrace_waiting_sequences", "Sequences queued in this worker", registry=registry)
        self.cache_hit_tokens = Counter(
            "headrace_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache", registry=registry
        )
        self.cache_query_tokens = Counter(
            "headrace_prefix_cache_query_tokens_total", "Prompt tokens looked up in the prefix cache", registry=registry
        )
        self.prompt_tokens = Counter(
            "headrace_prompt_tokens_total", "Prompt tokens of prefilled sequences, cached ones included",
            registry=registry,
        )  # fmt: skip
        self.output_tokens = Counter("headrace_output_tokens_total", "Tokens sampled", registry=registry)
        self.step_seconds = Histogram(
            "headrace_step_seconds", "Duration of a step", buckets=LATENCY_BUCKETS, registry=registry
        )
        self.step_tokens = Counter("headrace_step_tokens_total", "Tokens computed in steps", registry=registry)
        self.queue_seconds = Histogram(
            "headrace_queue_seconds", "From a sequence's arrival at this worker to its pages", buckets=PHASE_BUCKETS,
            registry=registry,
        )  # fmt: skip
        self.transfer_bytes = Counter(
            "headrace_transfer_bytes_total", "Page bytes moved", ["transport", "direction"], registry=registry
        )
        self.handoff_failures = Counter(
            "headrace_handoff_failures_total", "Hand-offs that ended without a takeover", ["reason"], registry=registry
        )
        self.expert_tokens = Counter(
            "headrace_expert_tokens_total", "Tokens routed to each expert", ["layer", "expert"], registry=registry
        )
        for state in PageState:
            self.kv_pages.labels(state.value).set(0)

    def observe_load(self, load: Load) -> None:
        """Show what the scheduler holds."""
        for state, count in load.page_counts.items():
            self.kv_pages.labels(state.value).set(count)
        self.running.set(load.num_running)
        self.waiting.set(load.num_waiting)

    def observe_step(self, report: StepReport) -> None:
        """Count one step."""
        self.step_seconds.observe(report.duration_s)
        self.step_tokens.inc(report.num_tokens)
        for layer, counts in report.expert_counts.items():
            for expert, count in enumerate(counts):
                if count:
                    self.expert_tokens.labels(str(layer), str(expert)).inc(count)
