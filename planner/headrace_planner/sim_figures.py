"""What a simulation measured, by the names and definitions of `headrace bench`; a test holds them together.

What a bench counts and a simulation can't know is left out: failures by reason, how late requests were sent.
"""

from __future__ import annotations

import numpy as np
from headrace_client.bench.figures import PERCENTILES, Figures, peak_concurrency, statistics_of, throughput
from numpy.typing import NDArray

from headrace_planner.sim_result import SimResult, Slo, weighted_percentile


def figures_of(result: SimResult, slo: Slo) -> Figures:
    """Return a simulation's figures; `request_goodput` is of TTFT and TPOT within `slo`."""
    recorder, workload = result.recorder, result.workload
    num_input = int(workload.num_prompt[recorder.is_done].sum())
    done_s = zip(recorder.arrival_s[recorder.is_done], recorder.last_s[recorder.is_done], strict=True)
    figures: Figures = {
        "duration": result.duration_s,
        "completed": result.num_done,
        "failed": len(workload) - result.num_done,
        "total_input_tokens": num_input,
        "total_output_tokens": result.num_output,
        **throughput(result.duration_s, result.num_done, num_input, result.num_output),
        "request_goodput": result.goodput(slo),
        "max_output_tokens_per_s": max(recorder.tokens_in_second.values(), default=0.0),
        "max_concurrent_requests": peak_concurrency([(float(begin), float(end)) for begin, end in done_s]),
    }
    for name, seconds in (("ttft", result.ttft_s), ("tpot", result.tpot_s), ("e2el", result.e2e_s)):
        known = seconds[recorder.is_done & ~np.isnan(seconds)]
        figures |= statistics_of(name, (1e3 * known).tolist())
    return figures | _of_gaps(*recorder.gaps())


def _of_gaps(gaps_s: NDArray[np.float64], weights: NDArray[np.float64]) -> Figures:
    """Return the statistics of ITL from gaps and how often each occurred."""
    if not len(gaps_s):
        return statistics_of("itl", [])
    mean = float(np.average(gaps_s, weights=weights))
    named = {
        "mean": mean,
        "median": weighted_percentile(gaps_s, weights, 50),
        "std": float(np.sqrt(np.average((gaps_s - mean) ** 2, weights=weights))),
        **{f"p{percent}": weighted_percentile(gaps_s, weights, percent) for percent in PERCENTILES},
    }
    return {f"{statistic}_itl_ms": 1e3 * value for statistic, value in named.items()}
