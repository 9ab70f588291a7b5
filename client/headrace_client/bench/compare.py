"""Whether two runs differ: each figure's ratio, with the interval that 95 of 100 resamples lie in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from headrace_client.bench.bootstrap import Draw, latencies_of, output_throughput
from headrace_client.bench.report import Run

NUM_RESAMPLES = 1000
_MOST_WORK = 100_000_000
"""Observations times resamples; of more observations there are fewer resamples."""
_LEAST_RESAMPLES = 100


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of two runs; `low` and `high` bound second / first."""

    name: str
    first: float
    second: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        """The second over the first."""
        return self.second / self.first if self.first else float("nan")

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves out 1."""
        return not self.low <= 1.0 <= self.high


def differences(first: Run, second: Run, *, seed: int = 0) -> list[Difference]:
    """Return how the second run's figures differ from the first's; one that either lacks is left out."""
    random = np.random.default_rng(seed)
    found: list[Difference] = []
    draws = [_drawn(run, random) for run in (first, second)]
    for name in draws[0]:
        key = name.replace("p50", "median")
        values = [run.figures.get(key) for run in (first, second)]
        if name not in draws[1] or values[0] is None or values[1] is None:
            continue
        low, high = _interval(draws[0][name], draws[1][name], random)
        found.append(Difference(key, values[0], values[1], low, high))
    return found


def cautions(first: Run, second: Run) -> list[str]:
    """Return what to know before the figures are compared: other settings, requests that failed, a run cut short."""
    names = list({**first.setting, **second.setting})
    told = [
        f"not the same: {name} is {first.setting.get(name)} in A, {second.setting.get(name)} in B"
        for name in names
        if first.setting.get(name) != second.setting.get(name)
    ]
    for side, run in (("A", first), ("B", second)):
        if failed := run.figures.get("failed"):
            told.append(f"{failed} of {len(run.records)} requests of {side} failed, and are in no latency")
        if run.figures.get("interrupted"):
            told.append(f"{side} was interrupted")
    return told


def table(found: list[Difference]) -> str:
    """Return the differences as text, a line each."""
    lines = [f"{'':<22} {'A':>12} {'B':>12} {'B ÷ A':>8}   95 % of resamples"]
    for each in found:
        verdict = "" if each.is_certain else "   no difference seen"
        lines.append(
            f"{each.name:<22} {each.first:>12.2f} {each.second:>12.2f} {each.ratio:>7.3f}×"
            f"   {each.low:.3f} to {each.high:.3f}{verdict}"
        )
    return "\n".join(lines)


def _drawn(run: Run, random: np.random.Generator) -> Mapping[str, Draw]:
    drawn: dict[str, Draw] = {}
    throughput = output_throughput(run.records, NUM_RESAMPLES, random)
    if len(throughput):
        drawn["output_throughput"] = throughput
    for latency, observations in latencies_of(run.records).items():
        if len(observations):
            count = max(_LEAST_RESAMPLES, min(NUM_RESAMPLES, _MOST_WORK // len(observations)))
            for statistic, draw in observations.resampled(count, random).items():
                drawn[f"{statistic}_{latency}_ms"] = draw
    return drawn


def _interval(first: Draw, second: Draw, random: np.random.Generator) -> tuple[float, float]:
    """Return the ratio's bounds; the two runs are independent, so any resample of one may stand with any of other."""
    count = max(len(first), len(second))
    ratios = random.choice(second, count) / np.maximum(random.choice(first, count), 1e-9)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
