"""How even the ranks of a group are: their tokens, their time, and what was moved to make them so; rank 0 shows it.

Of a layer's experts the page has `headrace_expert_tokens_total`; of its ranks a sample each, here.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from headrace_core.engine.balance import Moved, Seen


class BalanceMetrics:
    """See the module. Event loop only."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._rank_tokens = Gauge(
            "headrace_expert_rank_tokens", "Tokens that a rank's experts of a layer got of late", ["layer", "rank"],
            registry=registry,
        )  # fmt: skip
        self._slots = Gauge(
            "headrace_expert_slots", "Places for experts of a layer, on all ranks together", registry=registry
        )
        self._loss = Gauge(
            "headrace_expert_imbalance_loss", "Share of the experts' time that ranks wait for the busiest, by tokens",
            registry=registry,
        )  # fmt: skip
        self._rank_seconds = Counter(
            "headrace_rank_seconds_total", "Time of ranks in steps", ["rank", "part"], registry=registry
        )
        self._rebalances = Counter(
            "headrace_rebalances_total", "Times that experts were to be moved", ["outcome"], registry=registry
        )
        for outcome in ("done", "failed"):
            self._rebalances.labels(outcome)
        self._experts = Counter("headrace_moved_experts_total", "Experts read by ranks new to them", registry=registry)
        self._bytes = Counter("headrace_moved_expert_bytes_total", "Bytes of these experts", registry=registry)
        self._seconds = Counter(
            "headrace_rebalance_seconds_total", "From deciding that experts move until they had", registry=registry
        )

    def observe(self, news: Seen | Moved) -> None:
        """Show what rank 0's engine tells."""
        if isinstance(news, Seen):
            self._observe_seen(news)
            return
        self._rebalances.labels("failed" if news.problem else "done").inc()
        self._experts.inc(news.num_experts)
        self._bytes.inc(news.num_bytes)
        self._seconds.inc(news.seconds)

    def _observe_seen(self, seen: Seen) -> None:
        self._loss.set(seen.loss)
        self._slots.set(seen.num_slots)
        for layer, of_ranks in seen.rank_tokens.items():
            for rank, tokens in enumerate(of_ranks):
                self._rank_tokens.labels(str(layer), str(rank)).set(tokens)
        for rank, parts in enumerate(seen.parts):
            for part in ("compute", "communication", "waiting"):
                self._rank_seconds.labels(str(rank), part).inc(max(0.0, getattr(parts, part)))
