"""Metrics that every worker has, on its own registry. Seconds, bytes, tokens; docs/metrics.md lists them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace_core.batch.scheduler import Load
from headrace_core.engine.balance import Moved, Seen
from headrace_core.engine.engine import StepReport
from headrace_core.errors import HeadraceError
from headrace_core.kv.page_pool import PageState
from headrace_core.telemetry import LATENCY_BUCKETS, PHASE_BUCKETS
from headrace_core.worker.balance_metrics import BalanceMetrics
from headrace_core.worker.op_metrics import OpMetrics, Prediction

TRANSFER_REASONS = (
    "BAD_HANDOFF", "BAD_REQUEST", "BUG", "CHECKSUM", "DEADLINE_EXCEEDED", "HOLDER_LOST", "LAYOUT_MISMATCH",
    "LEASE_ENDED", "MODEL_MISMATCH", "NO_COMMON_TRANSPORT", "PROTOCOL", "SHORT_READ", "STALE_ATTEMPT", "STALE_PAGE",
    "TAKER_LOST", "TOKENS_MISMATCH", "WORKER_RESTARTED", "WRONG_TAKER",
)  # fmt: skip
"""What a hand-off itself can fail with. A holder may give any other reason for the work it was to do."""
REFUSALS = ("BAD_REQUEST", "MESSAGE_TIMEOUT", "NO_IDENTITY", "QUEUE_FULL", "WRONG_ROLE")
"""What a worker's door can refuse a call with."""


class ExpertTokens(Collector):
    """`headrace_expert_tokens_total`: summed per step with plain additions, turned into samples only when scraped."""

    def __init__(self) -> None:
        self._totals: dict[int, list[int]] = {}

    def add(self, counts: dict[int, list[int]]) -> None:
        """Add tokens per routed expert, by layer."""
        for layer, tokens in counts.items():
            before = self._totals.get(layer)
            self._totals[layer] = [a + b for a, b in zip(before, tokens, strict=True)] if before else list(tokens)

    def collect(self) -> Iterator[Metric]:
        """Yield the samples; called by the registry, on its own thread."""
        family = CounterMetricFamily(
            "headrace_expert_tokens", "Tokens routed to each expert", labels=["layer", "expert"]
        )
        for layer, tokens in list(self._totals.items()):
            for expert, count in enumerate(tokens):
                family.add_metric([str(layer), str(expert)], count)
        yield family


class WorkerMetrics:
    """The metric objects of one worker process. Every label value that is known is there from the first scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.kv_pages = Gauge("headrace_kv_pages", "Pages of the pool", ["state"], registry=registry)
        self.running = Gauge("headrace_running_sequences", "Sequences computed in steps", registry=registry)
        self.waiting = Gauge("headrace_waiting_sequences", "Sequences queued in this worker", registry=registry)
        self.ranks = Gauge("headrace_ranks", "Processes that are this worker: ranks of its group", registry=registry)
        self.cache_hit_tokens = Counter(
            "headrace_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache", registry=registry
        )
        self.cache_query_tokens = Counter(
            "headrace_prefix_cache_query_tokens_total", "Prompt tokens looked up in the prefix cache", registry=registry
        )
        self.prefilled_tokens = Counter(
            "headrace_prefilled_tokens_total", "Prompt tokens of prefilled sequences, cached ones included",
            registry=registry,
        )  # fmt: skip
        self.sampled_tokens = Counter("headrace_sampled_tokens_total", "Tokens sampled", registry=registry)
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
        for reason in TRANSFER_REASONS:
            self.handoff_failures.labels(reason)
        self.prefix_fetches = Counter(
            "headrace_prefix_fetches_total", "Sequences whose beginning was asked of who has it cached", ["outcome"],
            registry=registry,
        )  # fmt: skip
        for outcome in ("taken", "failed"):
            self.prefix_fetches.labels(outcome)
        self.prefix_fetched_tokens = Counter(
            "headrace_prefix_fetched_tokens_total",
            "Tokens that came so, and were not computed",
            registry=registry,
        )
        self.leases = Gauge("headrace_leases", "Sequences and prefixes held for their takers", registry=registry)
        self.lease_ends = Counter("headrace_lease_ends_total", "How leases ended", ["outcome"], registry=registry)
        for outcome in ("taken", "aborted"):
            self.lease_ends.labels(outcome)
        self.refused_calls = Counter(
            "headrace_refused_calls_total", "Calls refused before their message was read", ["reason"], registry=registry
        )
        for reason in REFUSALS:
            self.refused_calls.labels(reason)
        self.expert_tokens = ExpertTokens()
        registry.register(self.expert_tokens)
        self._balance = BalanceMetrics(registry)
        self._registry = registry
        self._operations: OpMetrics | None = None
        for state in PageState:
            self.kv_pages.labels(state.value).set(0)

    def show_operations(self, prediction: Prediction) -> None:
        """Show measured steps beside their prediction, from now on."""
        self._operations = OpMetrics(prediction)
        self._registry.register(self._operations)

    def close(self) -> None:
        """End what runs for metrics; they can still be read."""
        if self._operations:
            self._operations.close()

    def count_refused(self, _: str, error: HeadraceError | None) -> None:
        """Count a call that the server's door did not let in; see `door.OnRefused`."""
        if error is not None:
            self.refused_calls.labels(error.reason).inc()

    def observe_load(self, load: Load) -> None:
        """Show what the scheduler holds."""
        for state, count in load.page_counts.items():
            self.kv_pages.labels(state.value).set(count)
        self.running.set(load.num_running)
        self.waiting.set(load.num_waiting)

    def observe_balance(self, news: Seen | Moved) -> None:
        """Show how even a group's ranks are, or what moved between them."""
        self._balance.observe(news)

    def observe_step(self, report: StepReport) -> None:
        """Count one step."""
        self.step_seconds.observe(report.duration_s)
        self.step_tokens.inc(report.num_tokens)
        self.expert_tokens.add(report.expert_counts)
        if report.timing and self._operations:
            self._operations.add(report.timing, report.expert_counts)
