"""What the samples of `make bench-router` come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Samples = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]

_KEYS = {
    "http_us_per_token_256": ("paced_256", "headrace", "us_per_token"),
    "grpc_us_per_token_256": ("paced_256", "headrace-grpc", "us_per_token"),
    "vllm_router_us_per_token_256": ("paced_256", "vllm-router", "us_per_token"),
    "sglang_router_us_per_token_256": ("paced_256", "sglang-router", "us_per_token"),
    "http_us_per_request": ("short_16", "headrace", "us_per_request"),
    "grpc_us_per_request": ("short_16", "headrace-grpc", "us_per_request"),
    "vllm_router_us_per_request": ("short_16", "vllm-router", "us_per_request"),
    "sglang_router_us_per_request": ("short_16", "sglang-router", "us_per_request"),
}


def summary(samples: Samples) -> dict[str, float | None]:
    """Return the report's keys: the least of the rounds; None where a side was not measured."""
    found = {key: least(samples, cell, side, figure) for key, (cell, side, figure) in _KEYS.items()}
    best: dict[str, float | None] = {}
    for side in ("headrace", "headrace-grpc", "vllm-router", "sglang-router"):
        name = side.replace("headrace-grpc", "grpc").replace("headrace", "http").replace("-", "_")
        prefix = "" if side == "headrace" else f"{name}_"
        for percent in ("p50", "p99"):
            best[f"{prefix}added_ttft_ms_{percent}"] = _added(samples, "alone_1", side, "ttft_ms", percent)
            best[f"{prefix}added_itl_ms_{percent}"] = _added(samples, "paced_256", side, "itl_ms", percent)
        rates = [sample["tokens_per_s"] for sample in samples.get("full_256", {}).get(side, ())]
        best[f"{name}_max_tokens_per_s"] = max(rates, default=None)
    return found | best


def least(samples: Samples, cell: str, side: str, figure: str) -> float | None:
    """Return the least of the rounds."""
    return min((sample[figure] for sample in samples.get(cell, {}).get(side, ())), default=None)


def table(samples: Samples) -> str:
    """Return a line for each cell and side: the least CPU time, and p50 and p99 of the round that had it."""
    lines = [
        f"{'':<12}{'':<16}{'µs/token':>10}{'µs/request':>12}{'tokens/s':>10}{'TTFT p50, p99':>18}{'ITL p50, p99':>18}"
    ]
    for cell, by_side in samples.items():
        for side, rounds in by_side.items():
            best = min(rounds, key=lambda sample: sample["us_per_token"])
            times = "".join(f"{_pair(best[name]):>18}" for name in ("ttft_ms", "itl_ms"))
            figures = f"{best['us_per_token']:>10.1f}{best['us_per_request']:>12.0f}{best['tokens_per_s']:>10.0f}"
            lines.append(f"{cell:<12}{side:<16}{figures}{times}")
    return "\n".join(lines)


def _added(samples: Samples, cell: str, side: str, latency: str, percent: str) -> float | None:
    """Return what a side's clients waited longer than the stub's own, the medians of rounds compared."""
    medians = []
    for name in (side, "direct"):
        values = sorted(sample[latency][percent] for sample in samples.get(cell, {}).get(name, ()) if sample[latency])
        if not values:
            return None
        medians.append(values[len(values) // 2])
    return medians[0] - medians[1]


def _pair(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else f"{found['p50']:.2f}, {found['p99']:.2f}"
