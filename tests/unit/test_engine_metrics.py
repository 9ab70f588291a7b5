"""What dashboards read is there from the first scrape, under its documented name."""

import pytest
from headrace_core.engine.engine import StepReport
from headrace_core.worker.metrics import WorkerMetrics
from headrace_decode.metrics import DecodeMetrics
from headrace_prefill.metrics import PrefillMetrics
from prometheus_client import CollectorRegistry, generate_latest

WORKER = [
    "headrace_kv_pages", "headrace_running_sequences", "headrace_waiting_sequences",
    "headrace_prefix_cache_hit_tokens_total", "headrace_prefix_cache_query_tokens_total",
    "headrace_prefilled_tokens_total", "headrace_sampled_tokens_total", "headrace_step_seconds",
    "headrace_queue_seconds", "headrace_transfer_bytes_total", "headrace_handoff_failures_total",
    "headrace_expert_tokens_total", "headrace_expert_rank_tokens", "headrace_expert_imbalance_loss",
    "headrace_expert_slots", "headrace_rank_seconds_total", "headrace_rebalances_total", "headrace_moved_experts_total",
    "headrace_moved_expert_bytes_total", "headrace_rebalance_seconds_total",
]  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "names"),
    [
        (PrefillMetrics, ["headrace_prefill_seconds", "headrace_leases", "headrace_lease_ends_total"]),
        (
            DecodeMetrics,
            [
                "headrace_transfer_seconds",
                "headrace_preemptions_total",
                "headrace_handoffs",
                "headrace_draft_tokens_total",
                "headrace_drafts_total",
            ],
        ),
    ],
)
def test_every_documented_metric_is_scraped(metrics, names):
    registry = CollectorRegistry()
    metrics(registry)
    text = generate_latest(registry).decode()
    assert [name for name in [*WORKER, *names] if f"# TYPE {name} " not in text] == []


def test_expert_tokens_add_up():
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    for _ in range(2):
        metrics.observe_step(StepReport(3, 0.1, {1: [1, 0, 2]}))
    labels = [{"layer": "1", "expert": str(expert)} for expert in range(3)]
    assert [registry.get_sample_value("headrace_expert_tokens_total", label) for label in labels] == [2, 0, 4]


def test_drafts_are_counted_by_what_became_of_them():
    registry = CollectorRegistry()
    metrics = DecodeMetrics(registry, "mtp")
    for report in (StepReport(1, 0.1, {}), StepReport(6, 0.1, {}, num_drafts=3, num_drafted=5, num_accepted=2)):
        metrics.observe_step(report)
    labels = [{"method": "mtp", "outcome": outcome} for outcome in ("accepted", "rejected")]
    assert [registry.get_sample_value("headrace_draft_tokens_total", label) for label in labels] == [2, 3]
    assert registry.get_sample_value("headrace_drafts_total", {"method": "mtp"}) == 3
