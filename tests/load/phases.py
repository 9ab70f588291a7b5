"""What a worker is doing, as its metrics show: for who kills it then."""

from __future__ import annotations

from collections.abc import Callable

Gauges = dict[str, float]

PHASES: dict[tuple[str, str], Callable[[Gauges], bool]] = {
    ("prefill", "computing"): lambda gauges: gauges["headrace_running_sequences"] > 0,
    ("prefill", "holding"): lambda gauges: gauges["headrace_leases"] > 0,
    ("decode", "waiting"): lambda gauges: gauges["headrace_waiting_sequences"] > 0,
    ("decode", "decoding"): lambda gauges: gauges["headrace_running_sequences"] > 0,
}
"""What is seen in a worker's metrics the moment before it is killed."""
