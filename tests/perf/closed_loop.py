"""Clients that each ask again once they are answered: what they saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

PERCENTILES = (25, 50, 99)


@dataclass(frozen=True)
class RequestTimes:
    """One request as its client saw it: seconds from asking to each delta, and how many tokens it brought."""

    deltas: Sequence[tuple[float, int]]

    @property
    def num_tokens(self) -> int:
        """Tokens it brought."""
        return sum(count for _, count in self.deltas)

    def gaps_s(self) -> list[float]:
        """Return the gap before each token after the first delta's; tokens read together share theirs evenly."""
        return [gap for (last, _), (at, count) in pairwise(self.deltas) for gap in [(at - last) / count] * count]


def cell_figures(load: tuple[int, int], clients: int, times: Sequence[RequestTimes], wall_s: float) -> dict[str, Any]:
    """Return a cell's percentiles: TTFT and each request's tokens per second over requests, ITL over all gaps."""
    return {
        "tokens_in": load[0],
        "tokens_out": load[1],
        "clients": clients,
        "requests": len(times),
        "ttft_ms": percentiles([request.deltas[0][0] * 1e3 for request in times]),
        "itl_ms": percentiles([gap * 1e3 for request in times for gap in request.gaps_s()]),
        "request_tokens_per_s": percentiles([request.num_tokens / request.deltas[-1][0] for request in times]),
        "tokens_per_s": sum(request.num_tokens for request in times) / wall_s,
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p25, p50 and p99."""
    found: list[float] = np.percentile(list(values), PERCENTILES).tolist()
    return {f"p{percent}": value for percent, value in zip(PERCENTILES, found, strict=True)}
