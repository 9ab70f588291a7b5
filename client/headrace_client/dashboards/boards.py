"""What the dashboards show; docs/metrics.md says what each metric is."""

from __future__ import annotations

from headrace_client.dashboards.grafana import Choice, Dashboard, Panel, Query

_QUANTILES = (0.25, 0.5, 0.9, 0.99)
BUDGET = 0.01
"""Share of the observations that may miss an objective."""


def _rate(metric: str, by: str = "") -> str:
    total = f"sum by ({by})" if by else "sum"
    return f"{total} (rate({metric}[$__rate_interval]))"


def _ratio(over: str, under: str) -> str:
    """Return a ratio that is nothing, and not NaN, where nothing happened."""
    return f"{over} / ({under} > 0)"


def _quantile(quantile: float, metric: str, by: str = "") -> str:
    buckets = _rate(f"{metric}_bucket", f"le, {by}" if by else "le")
    return f"histogram_quantile({quantile}, {buckets}) >= 0"


def _quantiles(title: str, text: str, metric: str) -> Panel:
    queries = [Query(_quantile(quantile, metric), f"p{quantile * 100:.0f}") for quantile in _QUANTILES]
    return Panel(title, text, queries, "s")


def _p99(title: str, text: str, metric: str, by: str) -> Panel:
    return Panel(title, text, [Query(_quantile(0.99, metric, by), f"{{{{{by}}}}}")], "s")


def _counts(title: str, text: str, metric: str, by: str, unit: str = "short") -> Panel:
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return Panel(title, text, [Query(_rate(metric, by), legend)], unit)


def _missed(slo: str) -> str:
    return _ratio(_rate(f'headrace_slo_missed_total{{slo="{slo}"}}'), _rate(f"headrace_{slo}_seconds_count"))


LATENCY = Dashboard(
    "latency",
    "Latency",
    [
        _quantiles("Time to first token", "From a request's arrival to its first token.", "headrace_ttft_seconds"),
        _quantiles("Inter-token latency", "Gaps between two tokens; each token counts.", "headrace_itl_seconds"),
        _quantiles("Time per output token", "After the first, averaged per answer.", "headrace_tpot_seconds"),
        _quantiles("End to end", "From arrival to the last token.", "headrace_e2e_seconds"),
        Panel(
            "Where the time goes",
            "The waterfall's phases, averaged over answers; they sum to the time end to end.",
            [
                Query(
                    f"{_rate('headrace_phase_seconds_sum', 'phase')} / on () group_left () "
                    f"({_rate('headrace_e2e_seconds_count')} > 0)",
                    "{{phase}}",
                )
            ],
            "s",
            width=24,
            is_stacked=True,
        ),
        Panel(
            "Objectives kept",
            "Share of the first tokens and of the gaps within --slo-ttft-ms and --slo-itl-ms.",
            [Query(f"1 - {_missed(slo)}", slo) for slo in ("ttft", "itl")],
            "percentunit",
        ),
        Panel(
            "Error budget burnt",
            "1 is as fast as may be: 1 % of the observations miss the objective.",
            [Query(f"{_missed(slo)} / {BUDGET}", slo) for slo in ("ttft", "itl")],
        ),
    ],
)

THROUGHPUT = Dashboard(
    "throughput",
    "Throughput and batching",
    [
        Panel(
            "Tokens per second",
            "What clients got, and what they asked with.",
            [
                Query(_rate("headrace_output_tokens_total"), "output"),
                Query(_rate("headrace_prompt_tokens_total"), "prompt"),
            ],
        ),
        _counts("Requests per second", "By how they ended.", "headrace_requests_total", "outcome"),
        Panel(
            "Requests now",
            "Running ones include those that wait.",
            [
                Query("sum(headrace_running_requests)", "running"),
                Query("sum(headrace_queued_requests)", "queued"),
            ],
        ),
        Panel(
            "Sequences now",
            "In the workers' batches and queues.",
            [
                Query("sum by (role) (headrace_running_sequences)", "{{role}} running"),
                Query("sum by (role) (headrace_waiting_sequences)", "{{role}} waiting"),
            ],
        ),
        Panel(
            "Tokens per step",
            "The batch: more of them make better use of the weights that each step reads.",
            [
                Query(
                    _ratio(_rate("headrace_step_tokens_total", "role"), _rate("headrace_step_seconds_count", "role")),
                    "{{role}}",
                )
            ],
        ),
        _p99("Duration of a step, p99", "A step's length is a gap between tokens.", "headrace_step_seconds", "role"),
    ],
)

HANDOFF = Dashboard(
    "handoff",
    "Hand-off",
    [
        _counts(
            "Bytes moved", "Pages of the KV cache.", "headrace_transfer_bytes_total", "transport, direction", "Bps"
        ),
        Panel(
            "Speed while moving",
            "Bytes received over the time that runs of pages moved and were verified.",
            [
                Query(
                    _ratio(
                        _rate('headrace_transfer_bytes_total{direction="received"}', "transport"),
                        _rate("headrace_transfer_busy_seconds_total", "transport"),
                    ),
                    "{{transport}}",
                )
            ],
            "Bps",
        ),
        Panel(
            "Stages, p50",
            "After the first token; waiting for a turn to move; moved before it, and so hidden.",
            [
                Query(_quantile(0.5, f"headrace_{stage}_seconds"), stage.replace("_", " "))
                for stage in ("transfer", "transfer_wait", "hidden_transfer")
            ],
            "s",
        ),
        Panel(
            "Hidden",
            "Share of the bytes that moved while the prompt was computed.",
            [
                Query(
                    _ratio(
                        _rate("headrace_hidden_transfer_bytes_total"),
                        _rate('headrace_transfer_bytes_total{direction="received"}'),
                    ),
                    "hidden",
                )
            ],
            "percentunit",
        ),
        _counts("Failures", "Hand-offs without a takeover, by reason.", "headrace_handoff_failures_total", "reason"),
        Panel(
            "Held now",
            "Hand-offs under way, leases that wait for a taker, pages in quarantine.",
            [
                Query("sum(headrace_handoffs)", "hand-offs"),
                Query("sum by (role) (headrace_leases)", "leases {{role}}"),
                Query('sum(headrace_kv_pages{state="quarantined"})', "quarantined pages"),
            ],
        ),
        _counts(
            "Prefixes fetched", "From the decode worker that has them.", "headrace_prefix_fetches_total", "outcome"
        ),
    ],
)

_EACH_EXPERT = _rate("headrace_expert_tokens_total", "layer, expert")
_BY_EXPERT = _rate('headrace_expert_tokens_total{layer="$layer"}', "expert")

EXPERTS = Dashboard(
    "experts",
    "Experts",
    [
        Panel(
            "Load of each expert",
            "Tokens per second over the layer's mean: 1 is balanced.",
            [Query(f"{_BY_EXPERT} / on () group_left () (avg ({_BY_EXPERT}) > 0)", "{{expert}}")],
            kind="status-history",
            width=24,
        ),
        Panel(
            "Fullest over mean",
            "With experts on several GPUs all wait for the fullest.",
            [
                Query(
                    _ratio(f"max by (layer) ({_EACH_EXPERT})", f"avg by (layer) ({_EACH_EXPERT})"),
                    "layer {{layer}}",
                )
            ],
            width=24,
        ),
        Panel(
            "Busiest rank over mean",
            "Of groups with whole experts: a layer takes as long as its busiest rank; 1 is balanced.",
            [
                Query(
                    _ratio(
                        "max by (instance, layer) (headrace_expert_rank_tokens)",
                        "avg by (instance, layer) (headrace_expert_rank_tokens)",
                    ),
                    "{{instance}} layer {{layer}}",
                )
            ],
        ),
        Panel(
            "Time of ranks in steps",
            "What ranks spend computing, meeting, and waiting for those that still compute.",
            [
                Query(
                    f"{_rate('headrace_rank_seconds_total', 'part')} / on () group_left () "
                    f"({_rate('headrace_rank_seconds_total')} > 0)",
                    "{{part}}",
                )
            ],
            "percentunit",
            is_stacked=True,
        ),
        _counts("Rebalances", "Times that experts moved, or could not.", "headrace_rebalances_total", "outcome"),
        Panel(
            "Expert weights read to be moved",
            "Bytes per second, beside the steps.",
            [Query(_rate("headrace_moved_expert_bytes_total", "instance"), "{{instance}}")],
            "Bps",
        ),
    ],
    [Choice("layer", "headrace_expert_tokens_total")],
)

WORKERS = Dashboard(
    "workers",
    "Workers",
    [
        Panel(
            "Pages in use",
            "Owned by sequences; what the prefix cache holds gives way.",
            [
                Query(
                    'sum by (role, instance) (headrace_kv_pages{state="owned"}) / '
                    "sum by (role, instance) (headrace_kv_pages)",
                    "{{role}} {{instance}}",
                )
            ],
            "percentunit",
        ),
        Panel(
            "Pages",
            "Of all workers, by state.",
            [Query("sum by (state) (headrace_kv_pages)", "{{state}}")],
            is_stacked=True,
        ),
        Panel(
            "Prefix cache hits",
            "Share of the prompts' tokens.",
            [
                Query(
                    _ratio(
                        _rate("headrace_prefix_cache_hit_tokens_total", "role"),
                        _rate("headrace_prefix_cache_query_tokens_total", "role"),
                    ),
                    "{{role}}",
                )
            ],
            "percentunit",
        ),
        Panel(
            "Pre-emptions per second",
            "Sequences that are computed again for want of pages.",
            [Query(_rate("headrace_preemptions_total"), "pre-emptions")],
        ),
        _p99("Queue, p99", "From arrival at a worker to its pages.", "headrace_queue_seconds", "role"),
        Panel(
            "Measured over predicted",
            "How far each operation is from its roof.",
            [
                Query(
                    _ratio(
                        _rate("headrace_op_measured_seconds_total", "op"),
                        _rate("headrace_op_predicted_seconds_total", "op"),
                    ),
                    "{{op}}",
                )
            ],
        ),
        Panel(
            "CPU",
            "Cores in use.",
            [Query(_rate("process_cpu_seconds_total", "role, instance"), "{{role}} {{instance}}")],
        ),
        Panel(
            "Memory",
            "Resident.",
            [Query("sum by (role, instance) (process_resident_memory_bytes)", "{{role}} {{instance}}")],
            "bytes",
        ),
        Panel(
            "Workers and ranks",
            "Workers that answer Prometheus, and the processes that they are: a group of ranks is one worker, and gone "
            "as a whole when one of them dies.",
            [
                Query("count by (role) (headrace_ranks)", "{{role}} workers"),
                Query("sum by (role) (headrace_ranks)", "{{role}} ranks"),
            ],
        ),
    ],
)

ROUTER = Dashboard(
    "router",
    "Router",
    [
        Panel(
            "Queue",
            "Requests that wait for a worker.",
            [Query("sum(headrace_queued_requests)", "queued")],
        ),
        Panel(
            "Workers",
            "As the router sees them.",
            [Query("sum by (worker_role, state) (headrace_workers)", "{{worker_role}} {{state}}")],
        ),
        _counts("Refused", "Before a worker had them, by reason.", "headrace_refused_requests_total", "reason"),
        _counts("Attempts made again", "By what failed.", "headrace_retries_total", "reason"),
        Panel(
            "CPU per token",
            "The router's.",
            [
                Query(
                    _ratio(_rate('process_cpu_seconds_total{role="router"}'), _rate("headrace_output_tokens_total")),
                    "CPU",
                )
            ],
            "s",
        ),
    ],
)

BOARDS = (LATENCY, THROUGHPUT, HANDOFF, EXPERTS, WORKERS, ROUTER)
"""All of them, in the order in which one looks."""
