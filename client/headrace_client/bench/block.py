"""The block of text that serving benchmarks print."""

from __future__ import annotations

from typing import Any

from headrace_client.bench.figures import LATENCIES, PERCENTILES, Figures

_WIDTH = 50
_DELAY_MS = 100.0
"""Above which it is said how late requests were sent: by a load generator that is slow, or with `--concurrency`."""
_TITLES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}


def block(figures: Figures, setting: dict[str, Any]) -> str:
    """Return it, without a newline at its end; `setting` may have `rate` and `concurrency`."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]
    lines += [_line("Successful requests:", figures["completed"]), _line("Failed requests:", figures["failed"])]
    if setting.get("concurrency"):
        lines.append(_line("Maximum request concurrency:", setting["concurrency"]))
    if setting.get("rate"):
        lines.append(_line("Request rate configured (RPS):", float(setting["rate"])))
    lines += [
        _line("Benchmark duration (s):", figures["duration"]),
        _line("Total input tokens:", figures["total_input_tokens"]),
        _line("Total generated tokens:", figures["total_output_tokens"]),
        _line("Request throughput (req/s):", figures["request_throughput"]),
    ]
    if figures["request_goodput"] is not None:
        lines.append(_line("Request goodput (req/s):", figures["request_goodput"]))
    lines += [
        _line("Output token throughput (tok/s):", figures["output_throughput"]),
        _line("Peak output token throughput (tok/s):", float(figures["max_output_tokens_per_s"])),
        _line("Peak concurrent requests:", figures["max_concurrent_requests"]),
        _line("Total token throughput (tok/s):", figures["total_token_throughput"]),
    ]
    if figures["prefix_hit_rate"] is not None:
        lines.append(_line("Prefix cache hit rate (%):", 100 * figures["prefix_hit_rate"]))
    for name in LATENCIES:
        lines += _latency(name, figures)
    lines.append("=" * _WIDTH)
    lines += [f"failed with {reason}: {count}" for reason, count in figures["errors"].items()]
    if figures["max_send_delay_ms"] > _DELAY_MS:
        lines.append(f"sent up to {figures['max_send_delay_ms']:.0f} ms after they were due, which latencies count")
    if figures.get("short"):
        lines.append(f"answered with fewer tokens than asked for: {figures['short']}")
    if stopped := figures.get("interrupted"):
        lines.append(
            f"interrupted: {stopped['under_way']} requests were under way, {stopped['not_sent']} not sent; "
            "none of them counts"
        )
    return "\n".join(lines)


def _latency(name: str, figures: Figures) -> list[str]:
    title, short = _TITLES[name]
    lines = [f"{title:-^{_WIDTH}}"]
    for statistic in ("mean", "median", *(f"p{percent}" for percent in PERCENTILES if percent != 50)):
        label = statistic.capitalize()
        lines.append(_line(f"{label} {short} (ms):", figures[f"{statistic}_{name}_ms"]))
    return lines


def _line(label: str, value: float | None) -> str:
    shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40} {shown:<10}".rstrip()
