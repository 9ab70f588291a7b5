"""A straight line through what was measured last: time = start + slope · amount. Pure."""

from __future__ import annotations

import math

_KEPT = 0.97
"""What is left of an observation's weight after the next one: some 30 count."""
_LEAST_WEIGHT = 3.0
"""Observations before the line is told."""


class Line:
    """Least squares, older observations counting less; neither start nor slope is below 0. Mutated by `observe`."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    @property
    def is_known(self) -> bool:
        """False while too little was measured."""
        return self._weight >= _LEAST_WEIGHT

    def observe(self, amount: float, time_s: float) -> None:
        """Take a measurement."""
        for name, value in (("_weight", 1.0), ("_x", amount), ("_y", time_s), ("_xx", amount**2)):
            setattr(self, name, getattr(self, name) * _KEPT + value)
        self._xy = self._xy * _KEPT + amount * time_s

    def at(self, amount: float) -> float:
        """Return the time of an amount; NaN while the line is not known."""
        start_s, slope_s = self.parts()
        return start_s + slope_s * amount

    def parts(self) -> tuple[float, float]:
        """Return the line's start and slope; NaN while it is not known."""
        if not self.is_known:
            return math.nan, math.nan
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x**2
        # Of amounts that are all alike nothing is known but their time: it counts as theirs in proportion.
        if spread <= 1e-6 * mean_x**2:
            return (0.0, mean_y / mean_x) if mean_x else (mean_y, 0.0)
        slope = max(0.0, (self._xy / self._weight - mean_x * mean_y) / spread)
        start = mean_y - slope * mean_x
        return (start, slope) if start >= 0.0 else (0.0, self._xy / self._xx)
