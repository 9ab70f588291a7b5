"""The router's metrics. Seconds and tokens; one object, on its own registry.

What every token and every request counts in is plain numbers, turned into samples when somebody scrapes.
"""

from __future__ import annotations

import collections
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace_core.config import RouterSettings
from headrace_core.request import FinishReason
from headrace_core.telemetry import LATENCY_BUCKETS, PHASE_BUCKETS
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from headrace_router.timings import PHASES, Waterfall

OUTCOMES = ("ok", "invalid", "overloaded", "unavailable", "deadline", "cancelled", "failed")
REFUSALS = (
    "BAD_API_KEY", "BAD_GRAMMAR", "BAD_REQUEST", "BAD_SAMPLING", "BAD_TOKEN", "DEADLINE_EXCEEDED", "DRAINING",
    "EMPTY_PROMPT", "MESSAGE_TIMEOUT", "NO_FREE_PAGES", "NO_IDENTITY", "NO_WORKERS", "PROMPT_TOO_LONG", "QUEUE_FULL",
    "RATE_LIMITED", "SLO_UNREACHABLE", "START_FAILED", "UNKNOWN_MODEL", "WRONG_ROLE",
)  # fmt: skip
"""What a request can be refused with before a worker has it."""


class Observed:
    """One histogram's counts, whose `observe` costs a bisection. The event loop writes, the metrics thread reads."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0
        self._exemplars: list[Exemplar | None] = [None] * len(self._counts)

    def observe(self, value: float, num_times: int = 1) -> None:
        """Count `num_times` observations of `value`."""
        self._counts[bisect_left(self._edges, value)] += num_times
        self._sum += value * num_times

    def show(self, value: float, labels: dict[str, str]) -> None:
        """Let what was observed just now stand for its bucket."""
        self._exemplars[bisect_left(self._edges, value)] = Exemplar(labels, value, time.time())

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Add the counts to what is shown."""
        total = 0
        buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
        for edge, count, exemplar in zip(
            (*self._edges, "+Inf"), list(self._counts), list(self._exemplars), strict=True
        ):
            total += count
            buckets.append((str(edge), total) if exemplar is None else (str(edge), total, exemplar))
        family.add_metric(labels, buckets, self._sum)


class Histograms(Collector):
    """A family of histograms, one for each value of its label; or the one of a family without."""

    def __init__(
        self,
        name: str,
        documentation: str,
        buckets: Sequence[float],
        registry: CollectorRegistry,
        *,
        label: str = "",
        values: Sequence[str] = ("",),
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._label = label
        self.by_value = {value: Observed(tuple(buckets)) for value in values}
        registry.register(self)

    @property
    def only(self) -> Observed:
        """The one of a family without a label."""
        return self.by_value[""]

    def collect(self) -> Iterable[Metric]:
        """Return the samples; called by the registry."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=[self._label] if self._label else None)
        for value, observed in self.by_value.items():
            observed.add_to(family, [value] if self._label else [])
        yield family


@dataclass(frozen=True, slots=True)
class Objectives:
    """What times are to be kept, seconds; infinite where there is none."""

    ttft_s: float = math.inf
    itl_s: float = math.inf

    @classmethod
    def of(cls, settings: RouterSettings) -> Objectives:
        """Return those of the settings, where 0 is none."""
        return cls(settings.slo_ttft_ms / 1000 or math.inf, settings.slo_itl_ms / 1000 or math.inf)


class TokenMetrics(Collector):
    """What is counted as tokens come: TTFT, ITL, the tokens, and those that miss an objective. As `Observed`."""

    def __init__(self, registry: CollectorRegistry, objectives: Objectives) -> None:
        self._objectives = objectives
        self._num_late_first = 0
        self._num_late = 0
        self._ttft = Histograms(
            "headrace_ttft_seconds", "Arrival at the router to first token, per sample.", LATENCY_BUCKETS, registry
        ).only
        self._itl = Histograms(
            "headrace_itl_seconds", "Gap between two tokens of a sample, per token.", LATENCY_BUCKETS, registry
        ).only
        self._num_tokens = 0
        registry.register(self)

    def traced(self, trace_id: str) -> TokenMetrics | TracedTokens:
        """Return what counts the tokens of a request that has this trace; empty: none."""
        return TracedTokens(self, self._itl, {"trace_id": trace_id}) if trace_id else self

    def first(self, ttft_s: float, num_tokens: int, exemplar: dict[str, str] | None = None) -> None:
        """Count a sample's first message of tokens."""
        self._ttft.observe(ttft_s)
        if exemplar is not None:
            self._ttft.show(ttft_s, exemplar)
        self._num_tokens += num_tokens
        self._num_late_first += ttft_s > self._objectives.ttft_s

    def more(self, gap_s: float, num_tokens: int) -> None:
        """Count tokens that came together, `gap_s` after those before them."""
        itl_s = gap_s / num_tokens if num_tokens > 1 else gap_s
        self._itl.observe(itl_s, num_tokens)
        self._num_tokens += num_tokens
        if itl_s > self._objectives.itl_s:
            self._num_late += num_tokens

    def collect(self) -> Iterable[Metric]:
        """Return the samples; called by the registry."""
        yield CounterMetricFamily("headrace_output_tokens", "Tokens generated.", self._num_tokens)
        objectives = GaugeMetricFamily("headrace_slo_seconds", "Objective for a latency.", labels=["slo"])
        missed = CounterMetricFamily("headrace_slo_missed", "Observations above the objective.", labels=["slo"])
        for slo, limit_s, num_late in (
            ("ttft", self._objectives.ttft_s, self._num_late_first),
            ("itl", self._objectives.itl_s, self._num_late),
        ):
            if limit_s < math.inf:
                objectives.add_metric([slo], limit_s)
                missed.add_metric([slo], num_late)
        yield objectives
        yield missed


class TracedTokens:
    """Counts in `TokenMetrics`, and makes what it counts examples of their buckets that name the trace."""

    def __init__(self, tokens: TokenMetrics, itl: Observed, labels: dict[str, str]) -> None:
        self._tokens = tokens
        self._itl = itl
        self._labels = labels

    def first(self, ttft_s: float, num_tokens: int) -> None:
        """See `TokenMetrics`."""
        self._tokens.first(ttft_s, num_tokens, self._labels)

    def more(self, gap_s: float, num_tokens: int) -> None:
        """See `TokenMetrics`."""
        self._tokens.more(gap_s, num_tokens)
        self._itl.show(gap_s / num_tokens, self._labels)


class Gauges(Collector):
    """What is read from the router when somebody scrapes."""

    def __init__(
        self,
        requests: Callable[[], tuple[int, int]],
        workers: Callable[[], Sequence[tuple[str, str]]],
        kv_used: Callable[[], float],
        circuits: Callable[[], Sequence[tuple[str, str]]],
    ) -> None:
        """Take what to ask.

        Args:
            requests: (queued, running).
            workers: each one's (role, state).
            kv_used: the share of pages in use.
            circuits: each one's (role, circuit).
        """
        self._circuits = circuits
        self._requests = requests
        self._workers = workers
        self._kv_used = kv_used

    def collect(self) -> Iterable[Metric]:
        """Return the samples; called by the registry."""
        num_queued, num_running = self._requests()
        yield GaugeMetricFamily("headrace_queued_requests", "Requests waiting for a worker.", num_queued)
        yield GaugeMetricFamily("headrace_running_requests", "Requests under way, queued ones included.", num_running)
        yield GaugeMetricFamily(
            "headrace_fleet_kv_used_ratio", "Share of the decoding workers' pages that are in use.", self._kv_used()
        )
        yield _counted("workers", "Workers the router knows.", "state", self._workers())
        yield _counted("circuits", "Circuits of the workers the router knows.", "circuit", self._circuits())


def _counted(name: str, documentation: str, label: str, keys: Sequence[tuple[str, str]]) -> Metric:
    """Return how many workers there are of each role and state."""
    family = GaugeMetricFamily(f"headrace_{name}", documentation, labels=["worker_role", label])
    for key, count in sorted(collections.Counter(keys).items()):
        family.add_metric(list(key), count)
    return family


@dataclass(frozen=True, slots=True)
class RouterMetrics:
    """Every metric of the router."""

    registry: CollectorRegistry
    tokens: TokenMetrics
    tpot: Observed
    e2e: Observed
    phase: Mapping[str, Observed]
    """By name."""
    prompt_tokens: Counter
    requests: Mapping[str, Counter]
    """By outcome."""
    refused: Counter
    finished: Mapping[FinishReason, Counter]
    retries: Counter
    moves: Counter
    circuits_opened: Mapping[str, Counter]
    """By the worker's role."""

    @classmethod
    def create(cls, objectives: Objectives, registry: CollectorRegistry | None = None) -> RouterMetrics:
        """Return fresh metrics on a registry of their own; None: a plain one."""
        registry = registry or CollectorRegistry()

        def histogram(
            name: str, documentation: str, buckets: Sequence[float] = PHASE_BUCKETS, **labels: Any
        ) -> Histograms:
            return Histograms(f"headrace_{name}_seconds", documentation, buckets, registry, **labels)

        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"headrace_{name}", documentation, labels, registry=registry)

        phases = histogram(
            "phase", "Phases of the waterfall, per sample; they sum to E2E.", label="phase", values=PHASES
        )
        opened = counter(
            "circuits_opened",
            "Workers that got nothing new for a while, since they failed again and again.",
            "worker_role",
        )
        requests = counter("requests", "Requests, by how they ended.", "outcome")
        finished = counter("finished_samples", "Samples that ended well, by why they ended.", "finished_reason")
        metrics = cls(
            registry=registry,
            tokens=TokenMetrics(registry, objectives),
            tpot=histogram("tpot", "(E2E - TTFT) / (output tokens - 1), per sample.", LATENCY_BUCKETS).only,
            e2e=histogram("e2e", "Arrival at the router to last token, per sample.").only,
            phase=phases.by_value,
            prompt_tokens=counter("prompt_tokens", "Prompt tokens of accepted requests."),
            requests={outcome: requests.labels(outcome) for outcome in OUTCOMES},
            refused=counter("refused_requests", "Requests that ended before a worker had them, by reason.", "reason"),
            finished={reason: finished.labels(reason.value) for reason in FinishReason},
            retries=counter("retries", "Attempts that failed and were made again, by reason.", "reason"),
            moves=counter("moved_sequences", "Sequences that went on elsewhere, since their decode worker drained."),
            circuits_opened={role: opened.labels(role) for role in ("prefill", "decode", "both", "unknown")},
        )
        for reason in REFUSALS:
            metrics.refused.labels(reason)
        return metrics

    def observe_phases(self, waterfall: Waterfall, trace_id: str = "") -> None:
        """Count one sample's phases when it ended well; its trace, if it has one, is an exemplar of E2E."""
        total_s = waterfall.total_us / 1e6
        self.e2e.observe(total_s)
        if trace_id:
            self.e2e.show(total_s, {"trace_id": trace_id})
        for name, seconds in waterfall.sums_s().items():
            self.phase[name].observe(seconds)
