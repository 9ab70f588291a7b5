"""Which requests met their objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from headrace_core.errors import InvalidRequestError

from headrace_client.bench.record import Record


def _itl_s(record: Record) -> float:
    gaps = record.itls_s()
    return float(np.percentile(gaps, 99)) if gaps else 0.0


_MEASURES: Mapping[str, Callable[[Record], float]] = {
    "ttft": lambda record: record.ttft_s,
    "tpot": lambda record: record.tpot_s or 0.0,
    "itl": _itl_s,
    "e2el": lambda record: record.e2el_s,
}
"""Of `itl` it is the request's own p99."""


@dataclass(frozen=True, slots=True)
class Goodput:
    """The most that each of a request's latencies may be, seconds by name."""

    limits_s: Mapping[str, float]

    def is_met_by(self, record: Record) -> bool:
        """Return whether a request that was answered met all of them."""
        return all(_MEASURES[name](record) <= limit_s for name, limit_s in self.limits_s.items())


def parse_goodput(text: str) -> Goodput:
    """Read `ttft:500,itl:50`, milliseconds.

    Raises:
        InvalidRequestError: BAD_SLO, naming what is wrong.
    """
    limits_s: dict[str, float] = {}
    for part in text.replace(",", " ").split():
        name, _, limit = part.partition(":")
        try:
            limit_s = float(limit) / 1e3
        except ValueError:
            limit_s = -1.0
        if name not in _MEASURES or not 0 < limit_s < float("inf"):
            problem = f"--goodput: {part!r} is not NAME:MILLISECONDS of {', '.join(_MEASURES)}, such as ttft:500"
            raise InvalidRequestError("BAD_SLO", problem)
        limits_s[name] = limit_s
    if not limits_s:
        raise InvalidRequestError("BAD_SLO", "--goodput names nothing; write ttft:500,itl:50")
    return Goodput(limits_s)
