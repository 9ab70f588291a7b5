"""How sure a figure is: bootstrap over requests, which are drawn again with replacement.

A request brings all of its gaps: those of one answer are alike, so drawing gaps would promise too much. Throughput is
drawn in blocks of neighbouring seconds, which are alike as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from headrace_client.bench.figures import tokens_per_second
from headrace_client.bench.record import Record

Draw = NDArray[np.float64]
"""One value of a statistic for each resample."""


class Observations:
    """One latency's observations and the request that each is of."""

    def __init__(self, by_request: Sequence[Sequence[float]]) -> None:
        values = np.array([value for each in by_request for value in each])
        owners = np.repeat(np.arange(len(by_request)), [len(each) for each in by_request])
        order = np.argsort(values, kind="stable")
        self._values, self._owners = values[order], owners[order]
        self._num_requests = len(by_request)

    def __len__(self) -> int:
        return len(self._values)

    def resampled(self, num_resamples: int, random: np.random.Generator) -> dict[str, Draw]:
        """Return mean, p50 and p99 of each resample."""
        drawn: dict[str, list[float]] = {"mean": [], "p50": [], "p99": []}
        for _ in range(num_resamples):
            times = np.bincount(
                random.integers(0, self._num_requests, self._num_requests), minlength=self._num_requests
            )
            weights = times[self._owners]
            total = weights.sum()
            if not total:
                continue
            below = np.cumsum(weights)
            drawn["mean"].append(float((self._values * weights).sum() / total))
            for name, share in (("p50", 0.5), ("p99", 0.99)):
                drawn[name].append(float(self._values[np.searchsorted(below, share * total)]))
        return {name: np.array(values) for name, values in drawn.items()}


def latencies_of(records: Sequence[Record]) -> dict[str, Observations]:
    """Return each latency's observations, ms."""
    answered = [record for record in records if record.is_ok]
    of_each: dict[str, Callable[[Record], list[float]]] = {
        "ttft": lambda record: [record.ttft_s],
        "tpot": lambda record: [tpot_s] if (tpot_s := record.tpot_s) is not None else [],
        "itl": lambda record: record.itls_s(),
        "e2el": lambda record: [record.e2el_s],
    }
    return {
        name: Observations([[1e3 * value for value in values(record)] for record in answered])
        for name, values in of_each.items()
    }


def output_throughput(records: Sequence[Record], num_resamples: int, random: np.random.Generator) -> Draw:
    """Return resampled output tokens per second, from whole seconds in blocks; empty for a run of fewer than 3."""
    seconds = np.array(tokens_per_second([record for record in records if record.is_ok])[:-1], dtype=np.float64)
    if len(seconds) < 3:
        return np.array([])
    block = max(1, round(len(seconds) ** (1 / 3)))
    num_blocks = -(-len(seconds) // block)
    starts = random.integers(0, len(seconds) - block + 1, (num_resamples, num_blocks))
    places = (starts[:, :, None] + np.arange(block)).reshape(num_resamples, -1)[:, : len(seconds)]
    means: Draw = seconds[places].mean(axis=1)
    return means
