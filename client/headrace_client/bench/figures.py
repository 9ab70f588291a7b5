"""What a run comes to, by the names that `vllm bench serve` writes: seconds for durations, ms for latencies.

Two averages that look alike: mean ITL is over all gaps between tokens, so a long answer counts more; mean TPOT is over
requests, each of which counts once (docs/metrics.md has an example).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace_client.bench.goodput import Goodput
from headrace_client.bench.record import Record

PERCENTILES = (25, 50, 75, 90, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")

Figures = dict[str, Any]


def latencies_ms(records: Sequence[Record]) -> dict[str, list[float]]:
    """Return every observation of each latency, of the requests that were answered."""
    answered = [record for record in records if record.is_ok]
    return {
        "ttft": [1e3 * record.ttft_s for record in answered],
        "tpot": [1e3 * tpot_s for record in answered if (tpot_s := record.tpot_s) is not None],
        "itl": [1e3 * gap_s for record in answered for gap_s in record.itls_s()],
        "e2el": [1e3 * record.e2el_s for record in answered],
    }


def throughput(duration_s: float, num_completed: int, num_input: int, num_output: int) -> Figures:
    """Return rates per second: of requests, of tokens generated, of all tokens."""
    seconds = duration_s or float("inf")
    return {
        "request_throughput": num_completed / seconds,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
    }


def figures_of(records: Sequence[Record], goodput: Goodput | None = None) -> Figures:
    """Return a run's figures; a latency of which there is no observation is None."""
    answered = [record for record in records if record.is_ok]
    duration_s = max((record.end_s for record in records), default=0.0)
    num_input, num_output = sum(each.num_prompt for each in answered), sum(each.num_output for each in answered)
    figures: Figures = {
        "duration": duration_s,
        "completed": len(answered),
        "failed": len(records) - len(answered),
        "short": sum(record.is_short for record in records),
        "errors": dict(Counter(record.error or "EMPTY" for record in records if not record.is_ok)),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        **throughput(duration_s, len(answered), num_input, num_output),
        "request_goodput": None,
        "max_output_tokens_per_s": max(tokens_per_second(answered), default=0),
        "max_concurrent_requests": peak_concurrency([(each.sent_s, each.end_s) for each in records]),
        "max_send_delay_ms": 1e3 * max((each.sent_s - each.intended_s for each in records), default=0.0),
        "prefix_hit_rate": _hit_rate(answered, num_input),
    }
    if goodput is not None and duration_s:
        figures["request_goodput"] = sum(map(goodput.is_met_by, answered)) / duration_s
    for name, values in latencies_ms(records).items():
        figures |= statistics_of(name, values)
    return figures


def tokens_per_second(records: Sequence[Record]) -> list[int]:
    """Return how many tokens came in each second."""
    last_s = max((record.deltas[-1][0] for record in records if record.deltas), default=-1.0)
    counts = [0] * (int(last_s) + 1)
    for record in records:
        for at_s, count in record.deltas:
            counts[int(at_s)] += count
    return counts


def statistics_of(name: str, values: Sequence[float]) -> Figures:
    """Return mean, median, standard deviation and percentiles of a latency's observations, ms; None where none is."""
    if not values:
        none = ("mean", "median", "std", *(f"p{percent}" for percent in PERCENTILES))
        return {f"{statistic}_{name}_ms": None for statistic in none}
    found: list[float] = np.percentile(values, PERCENTILES).tolist()
    named = {f"p{percent}_{name}_ms": value for percent, value in zip(PERCENTILES, found, strict=True)}
    return {
        f"mean_{name}_ms": float(np.mean(values)),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(np.std(values)),
        **named,
    }


def peak_concurrency(spans: Sequence[tuple[float, float]]) -> int:
    """Return how many of these (begin, end) were under way at once, at most."""
    events = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    return max(np.cumsum([change for _, change in events]).tolist(), default=0)


def _hit_rate(answered: Sequence[Record], num_input: int) -> float | None:
    """Return the share of prompt tokens that a prefix cache had; None if a server did not say."""
    cached = [record.num_cached for record in answered if record.num_cached is not None]
    return sum(cached) / num_input if num_input and len(cached) == len(answered) else None
