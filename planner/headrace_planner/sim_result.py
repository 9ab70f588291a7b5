"""What a simulation measured: latencies, goodput, utilisation. Definitions are docs/glossary.md's.

Every latency is a client's, as in `headrace bench`. TTFT: sending to the first token at the client. ITL: a gap between
two tokens of one request, a distribution over gaps. TPOT: (E2E - TTFT) / (output tokens - 1), one number per request.
Rates are over the time from the first arrival to the last token, and of requests that ended well. Goodput: requests per
second whose TTFT and TPOT both met the objective, over the same time. Percentiles lie between two observations as
`numpy.percentile` has it.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from headrace_core.errors import InvalidRequestError
from headrace_core.request_trace import Workload
from numpy.typing import NDArray

from headrace_planner.sim_request import SimRequest

PERCENTILES = (25, 50, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper limits, seconds."""

    ttft_s: float = float("inf")
    itl_s: float = float("inf")
    """Of a step; of what was simulated each request's TPOT is held against it."""


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """One worker's part. `busy_s` seconds computing, `num_tokens` computed in `num_steps` steps."""

    address: str
    role: str
    busy_s: float
    num_steps: int
    num_tokens: int


class Recorder:
    """Collects while the simulation runs. One entry per request, one per gap or run of equal gaps."""

    def __init__(self, num_requests: int) -> None:
        self.first_s = np.full(num_requests, np.nan)
        self.last_s = np.full(num_requests, np.nan)
        self.is_done = np.zeros(num_requests, dtype=bool)
        self.arrival_s = np.full(num_requests, np.nan)
        self.num_tokens = np.zeros(num_requests, dtype=np.int64)
        self.num_cached = np.zeros(num_requests, dtype=np.int64)
        self.num_attempts = np.zeros(num_requests, dtype=np.int64)
        self.num_refused = 0
        self.tokens_in_second: dict[int, float] = defaultdict(float)
        """Output tokens that reached clients in each second since time 0."""
        self._gaps = array("d")
        self._weights = array("d")

    def over(self, request: SimRequest, *, is_done: bool) -> None:
        """Take note of a request that got its last token, or was refused."""
        index = request.index
        self.arrival_s[index] = request.arrival_s
        self.first_s[index] = request.first_token_s
        self.num_tokens[index] = request.num_done
        self.num_cached[index] = request.num_cached
        self.num_attempts[index] = request.attempt
        if is_done:
            self.last_s[index] = request.last_token_s
            self.is_done[index] = True
        else:
            self.num_refused += 1

    def gap(self, seconds: float, count: int = 1) -> None:
        """Add `count` equal gaps."""
        self._gaps.append(seconds)
        self._weights.append(count)

    def tokens(self, begin_s: float, step_s: float, num_steps: int, num_tokens: float) -> None:
        """Count tokens that came with `num_steps` steps of equal length after `begin_s`, as many with each."""
        done = 0
        while done < num_steps:
            second = int(begin_s + (done + 1) * step_s)
            until = num_steps
            if begin_s + num_steps * step_s >= second + 1:
                until = max(done + 1, ceil((second + 1 - begin_s) / step_s) - 1)  # what ends later is another second's
            self.tokens_in_second[second] += num_tokens * (until - done) / num_steps
            done = until

    def gaps(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the gaps and how often each occurred."""
        return np.frombuffer(self._gaps, dtype=np.float64), np.frombuffer(self._weights, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class SimResult:
    """See the module. Arrays have one entry per request; NaN where a request did not get so far."""

    workload: Workload
    recorder: Recorder
    workers: Sequence[WorkerUse]
    end_s: float
    """When the last token came, in simulated time."""
    wall_s: float
    num_events: int
    fidelity: str
    transfer_bytes: float = 0.0

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """TTFT of each request."""
        return self.recorder.first_s - self.recorder.arrival_s

    @property
    def e2e_s(self) -> NDArray[np.float64]:
        """Arrival to last token of each request that ended."""
        return np.where(self.recorder.is_done, self.recorder.last_s - self.recorder.arrival_s, np.nan)

    @property
    def tpot_s(self) -> NDArray[np.float64]:
        """TPOT of each request of two tokens or more that ended."""
        gaps = self.workload.num_output - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            tpot = (self.recorder.last_s - self.recorder.first_s) / gaps
        return np.where(self.recorder.is_done & (gaps > 0), tpot, np.nan)

    @property
    def num_done(self) -> int:
        """Requests that got their last token."""
        return int(self.recorder.is_done.sum())

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last token."""
        arrival_s = self.recorder.arrival_s
        return self.end_s - float(np.nanmin(arrival_s)) if self.num_done else 0.0

    @property
    def num_output(self) -> int:
        """Output tokens of requests that got their last one."""
        return int(self.recorder.num_tokens[self.recorder.is_done].sum())

    @property
    def request_rate(self) -> float:
        """Finished requests per second."""
        return self._per_second(self.num_done)

    @property
    def output_rate(self) -> float:
        """Output tokens per second, of finished requests."""
        return self._per_second(self.num_output)

    def attainment(self, slo: Slo) -> float:
        """Return the share of requests that met `slo`; those that did not end, or were refused, did not."""
        tpot = np.nan_to_num(self.tpot_s, nan=0.0)
        is_met = self.recorder.is_done & (self.ttft_s <= slo.ttft_s) & (tpot <= slo.itl_s)
        return float(is_met.mean()) if len(is_met) else 0.0

    def goodput(self, slo: Slo) -> float:
        """Return requests per second that met `slo`: never more than `request_rate`."""
        return self._per_second(self.attainment(slo) * len(self.workload))

    def itl_percentile(self, percent: float) -> float:
        """Return a percentile of all gaps, seconds; NaN if there were none."""
        gaps, weights = self.recorder.gaps()
        return weighted_percentile(gaps, weights, percent)

    def itl_mean(self) -> float:
        """Return the mean of all gaps, seconds."""
        gaps, weights = self.recorder.gaps()
        return float(np.average(gaps, weights=weights)) if len(gaps) else float("nan")

    def utilisation(self, role: str) -> float:
        """Return the share of time that workers of `role` computed."""
        busy = [worker.busy_s for worker in self.workers if worker.role == role]
        return self._per_second(float(np.mean(busy))) if busy else 0.0

    def _per_second(self, amount: float) -> float:
        return amount / self.duration_s if self.duration_s else 0.0

    def summary(self, slo: Slo | None = None) -> dict[str, Any]:
        """Return everything as plain numbers, for JSON and tables."""
        report: dict[str, Any] = {
            "num_requests": len(self.workload),
            "num_done": self.num_done,
            "num_refused": self.recorder.num_refused,
            "num_retried": int((self.recorder.num_attempts > 1).sum()),
            "simulated_s": self.end_s,
            "wall_s": self.wall_s,
            "fidelity": self.fidelity,
            "request_rate": self.request_rate,
            "output_tokens_per_s": self.output_rate,
            "cached_prompt_share": float(self.recorder.num_cached.sum() / max(1, self.workload.num_prompt.sum())),
            "transfer_bytes": self.transfer_bytes,
            "utilisation": {role: self.utilisation(role) for role in sorted({w.role for w in self.workers})},
        }
        for name, values in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s), ("e2e_s", self.e2e_s)):
            report[name] = {f"p{p}": _percentile(values, p) for p in PERCENTILES} | {"mean": _mean(values)}
        report["itl_s"] = {f"p{p}": self.itl_percentile(p) for p in PERCENTILES} | {"mean": self.itl_mean()}
        if slo is not None:
            report["goodput"] = self.goodput(slo)
            report["slo_attainment"] = self.attainment(slo)
        return report


def _percentile(values: NDArray[np.float64], percent: float) -> float:
    known = values[~np.isnan(values)]
    return float(np.percentile(known, percent)) if len(known) else float("nan")


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def weighted_percentile(values: NDArray[np.float64], weights: NDArray[np.float64], percent: float) -> float:
    """Return what `numpy.percentile` would of each value repeated as often as its weight says; NaN of none."""
    if not len(values):
        return float("nan")
    order = np.argsort(values)
    below = np.cumsum(weights[order])
    place = (below[-1] - 1) * percent / 100
    low, high = (values[order][np.searchsorted(below, at, side="right")] for at in (np.floor(place), np.ceil(place)))
    return float(low + (high - low) * (place - np.floor(place)))


_SLO_NAMES = {"tpot": "itl"}


def parse_slo(text: str) -> Slo:
    """Read `ttft=2,itl=0.05`; seconds, or `50ms`; either may be left out, and `tpot` is another name for itl.

    Raises:
        InvalidRequestError: BAD_SLO.
    """
    limits: dict[str, float] = {}
    try:
        for part in text.split(","):
            name, value = part.split("=")
            scale = 1e-3 if value.strip().endswith("ms") else 1.0
            limits[_SLO_NAMES.get(name.strip(), name.strip())] = (
                float(value.strip().removesuffix("ms").removesuffix("s")) * scale
            )
    except ValueError:
        raise InvalidRequestError("BAD_SLO", f"{text!r} is not ttft=SECONDS,itl=SECONDS, as ttft=2,itl=50ms") from None
    unknown = set(limits) - {"ttft", "itl"}
    if unknown or not all(limit > 0 for limit in limits.values()):  # NaN is neither
        raise InvalidRequestError("BAD_SLO", f"{text!r}: give positive ttft and itl, nothing else")
    return Slo(limits.get("ttft", float("inf")), limits.get("itl", float("inf")))
