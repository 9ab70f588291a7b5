"""One process' metrics at one time, what came since an earlier time, and what can be asked of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from headrace_core.metrics_page import read_metrics
from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 2.0
_GROWING = ("_total", "_bucket", "_count", "_sum")

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Samples:
    """Values by metric and labels, `role` left out; taken at `at_s`, seconds of any clock that does not jump."""

    at_s: float
    values: Mapping[str, Mapping[Labels, float]]

    @staticmethod
    def of(text: str, at_s: float) -> Samples:
        """Read what a process' `/metrics` says.

        Raises:
            ValueError: it is no such text.
        """
        values: defaultdict[str, dict[Labels, float]] = defaultdict(dict)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = frozenset((name, value) for name, value in sample.labels.items() if name != "role")
                values[sample.name][labels] = sample.value
        return Samples(at_s, values)

    def since(self, before: Samples) -> Samples:
        """Return what came after `before`, gauges as they are: all there is if the process began in between."""
        values: dict[str, dict[Labels, float]] = {}
        for name, by_labels in self.values.items():
            earlier = before.values.get(name, {}) if name.endswith(_GROWING) else {}
            values[name] = {labels: value - earlier.get(labels, 0.0) for labels, value in by_labels.items()}
            if any(value < 0 for value in values[name].values()) and earlier:
                return self
        return Samples(self.at_s, values)

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's values that have these labels; 0 if there are none."""
        wanted = labels.items()
        return sum(value for has, value in self.values.get(name, {}).items() if wanted <= has)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return a metric's sums by the values of a label."""
        sums: defaultdict[str, float] = defaultdict(float)
        for labels, value in self.values.get(name, {}).items():
            sums[dict(labels).get(label, "")] += value
        return dict(sums)

    def labelled(self, name: str, *, key: str, of: str) -> dict[str, dict[str, float]]:
        """Return a metric's values by the values of two labels."""
        found: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for labels, value in self.values.get(name, {}).items():
            have = dict(labels)
            found[have.get(key, "")][have.get(of, "")] = value
        return dict(found)

    def histogram(self, name: str, **labels: str) -> Histogram:
        """Return a histogram's observations with these labels."""
        counts: defaultdict[float, float] = defaultdict(float)
        for has, value in self.values.get(f"{name}_bucket", {}).items():
            if labels.items() <= has:
                counts[float(dict(has)["le"])] += value
        return Histogram(tuple(sorted(counts.items())))


@dataclass(frozen=True, slots=True)
class Histogram:
    """(upper edge, observations up to it) of each bucket, in order."""

    buckets: tuple[tuple[float, float], ...] = ()

    @property
    def count(self) -> float:
        """How many there are."""
        return self.buckets[-1][1] if self.buckets else 0.0

    def __add__(self, other: Histogram) -> Histogram:
        """Return both together; they have the same edges, or one has none."""
        if not self.buckets or not other.buckets:
            return self if self.buckets else other
        return Histogram(
            tuple((edge, one + two) for (edge, one), (_, two) in zip(self.buckets, other.buckets, strict=True))
        )

    def quantile(self, share: float) -> float | None:
        """Return what `share` of them are no larger than, interpolated as Prometheus does; None without any.

        Past the last edge nothing is known: that edge is returned.
        """
        rank, low, below = share * self.count, 0.0, 0.0
        for edge, count in self.buckets:
            if count >= rank and count > below:
                return low if math.isinf(edge) else low + (edge - low) * (rank - below) / (count - below)
            low, below = edge, count
        return None


def scrape(address: str, at_s: float) -> Samples | None:
    """Return the metrics served at `host:port`; None if they can't be had."""
    try:
        return Samples.of(read_metrics(address, _TIMEOUT_S), at_s)
    except ValueError:
        return None
