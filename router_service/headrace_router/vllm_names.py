"""A registry that also shows its metrics by the names that vLLM gives them, for dashboards and autoscalers made for it.

Each is one of ours under another name, with vLLM's labels `model_name` and `engine`; `NAMES` is the table that
docs/metrics.md shows. vLLM's that nothing here counts are not shown, rather than shown with 0.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Metric


@dataclass(frozen=True, slots=True)
class _Name:
    """One of vLLM's: a metric of ours, or that of its samples which have `where`, a label that it then has not."""

    ours: str
    where: dict[str, str] = field(default_factory=dict[str, str])
    less: str = ""
    """A metric whose value is taken off: vLLM counts what waits apart from what runs."""


NAMES = {
    "vllm:num_requests_running": _Name("headrace_running_requests", less="headrace_queued_requests"),
    "vllm:num_requests_waiting": _Name("headrace_queued_requests"),
    "vllm:kv_cache_usage_perc": _Name("headrace_fleet_kv_used_ratio"),
    "vllm:gpu_cache_usage_perc": _Name("headrace_fleet_kv_used_ratio"),
    "vllm:prompt_tokens": _Name("headrace_prompt_tokens"),
    "vllm:generation_tokens": _Name("headrace_output_tokens"),
    "vllm:request_success": _Name("headrace_finished_samples"),
    "vllm:time_to_first_token_seconds": _Name("headrace_ttft_seconds"),
    "vllm:inter_token_latency_seconds": _Name("headrace_itl_seconds"),
    "vllm:time_per_output_token_seconds": _Name("headrace_itl_seconds"),
    "vllm:request_time_per_output_token_seconds": _Name("headrace_tpot_seconds"),
    "vllm:e2e_request_latency_seconds": _Name("headrace_e2e_seconds"),
    "vllm:request_queue_time_seconds": _Name("headrace_phase_seconds", {"phase": "queue"}),
    "vllm:request_prefill_time_seconds": _Name("headrace_phase_seconds", {"phase": "prefill"}),
    "vllm:request_decode_time_seconds": _Name("headrace_phase_seconds", {"phase": "decode"}),
}
"""By vLLM's name, a counter's without its `_total`."""


class VllmNames(CollectorRegistry):
    """See the module."""

    def __init__(self, model_name: str) -> None:
        super().__init__()
        self._labels = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        """Yield ours, then the same by vLLM's names; called by whoever scrapes."""
        ours: dict[str, Metric] = {}
        for metric in super().collect():
            ours[metric.name] = metric
            yield metric
        for name, of in NAMES.items():
            if of.ours in ours:
                yield self._renamed(name, of, ours)

    def _renamed(self, name: str, of: _Name, ours: dict[str, Metric]) -> Metric:
        metric = ours[of.ours]
        less = ours[of.less].samples[0].value if of.less else 0
        renamed = Metric(name, metric.documentation, metric.type)
        renamed.samples = [
            sample._replace(
                name=name + sample.name.removeprefix(metric.name),
                labels={**_without(sample.labels, of.where), **self._labels},
                value=sample.value - less,
                exemplar=None,
            )
            for sample in metric.samples
            if of.where.items() <= sample.labels.items()
        ]
        return renamed


def table() -> str:
    """Return the table of docs/metrics.md, in Markdown."""
    lines = ["| vLLM's | ours |", "|---|---|"]
    for name, of in NAMES.items():
        where = "".join(f'{{{label}="{value}"}}' for label, value in of.where.items())
        lines.append(f"| `{name}` | `{of.ours}{where}`{f' less `{of.less}`' if of.less else ''} |")
    return "\n".join(lines) + "\n"


def _without(labels: dict[str, str], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in labels.items() if name not in set(names)}


if __name__ == "__main__":
    sys.stdout.write(table())
