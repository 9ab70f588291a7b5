"""Charts as SVG text: lines over two axes, and rows of bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 960, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 30, 40
_COLOURS = ("#d9480f", "#0b6e99", "#5f3dc4", "#2b8a3e")
_WAIT, _FIRST, _DECODE, _FAILED = "#ced4da", "#f08c00", "#4dabf7", "#e03131"
_ROW = 4

Point = tuple[float, float]
Row = tuple[float, float, float, float, bool]
"""Intended, sent, first token, end (s), and whether it was answered."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line and its name."""

    label: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture; `draw` and `draw_rows` return it as an `<svg>` element."""

    title: str
    x_unit: str
    y_unit: str
    x_log: bool = False

    def draw(self, curves: Sequence[Curve]) -> str:
        """Draw lines."""
        points = [point for curve in curves for point in curve.points]
        if not points:
            return ""
        x = _Axis.over([at for at, _ in points], _LEFT, _WIDTH - _RIGHT, is_log=self.x_log)
        y = _Axis.over([0.0, *(value for _, value in points)], _HEIGHT - _BOTTOM, _TOP)
        parts = [*self._frame(x, y, _HEIGHT)]
        for index, curve in enumerate(curves):
            colour = _COLOURS[index % len(_COLOURS)]
            path = " ".join(f"{x.at(at):.1f},{y.at(value):.1f}" for at, value in curve.points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            place = _WIDTH - _RIGHT - 80 * (len(curves) - index)
            parts.append(f'<text x="{place}" y="18" style="fill:{colour}">{escape(curve.label)}</text>')
        return _element(parts, _HEIGHT)

    def draw_rows(self, rows: Sequence[Row]) -> str:
        """Draw requests, a row each."""
        if not rows:
            return ""
        height = _TOP + _BOTTOM + _ROW * len(rows)
        x = _Axis.over([0.0, *(row[3] for row in rows)], _LEFT, _WIDTH - _RIGHT)
        parts = [*self._frame(x, None, height)]
        for index, (intended, sent, first, end, is_ok) in enumerate(rows):
            top = _TOP + index * _ROW
            bars = ((intended, sent, _WAIT), (sent, first, _FIRST if is_ok else _FAILED), (first, end, _DECODE))
            for begin, until, colour in bars:
                width = x.at(until) - x.at(begin)
                if width > 0:
                    place = f'x="{x.at(begin):.1f}" y="{top}" width="{width:.1f}" height="{_ROW - 1}"'
                    parts.append(f'<rect {place} fill="{colour}"/>')
        return _element(parts, height)

    def _frame(self, x: _Axis, y: _Axis | None, height: int) -> list[str]:
        bottom = height - _BOTTOM
        parts = [f'<text x="{_LEFT}" y="18" style="font-weight:600">{escape(self.title)}</text>']
        for tick in x.ticks():
            at = x.at(tick)
            parts.append(f'<line x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}" stroke="#e9ecef"/>')
            parts.append(f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{tick:g}</text>')
        for tick in y.ticks() if y is not None else ():
            at = y.at(tick) if y is not None else 0.0
            parts.append(f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}" stroke="#e9ecef"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{bottom + 32}" text-anchor="end">{escape(self.x_unit)}</text>')
        if self.y_unit:
            parts.append(f'<text x="8" y="{_TOP + 8}">{escape(self.y_unit)}</text>')
        return parts


@dataclass(frozen=True, slots=True)
class _Axis:
    """From values to pixels."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], begin: float, end: float, *, is_log: bool = False) -> _Axis:
        """Return the axis that holds all of them."""
        low, high = min(values), max(values)
        if is_log:
            low = max(low, 1e-3)
        return cls(low, max(high, low * 1.01 + 1e-9), begin, end, is_log)

    def at(self, value: float) -> float:
        """Return where a value is."""
        low, high, value = (
            (math.log10(each) for each in (self.low, self.high, max(value, self.low)))
            if self.is_log
            else (self.low, self.high, value)
        )
        return self.begin + (self.end - self.begin) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Return round values between the ends."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        else:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
            step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 6)
            first = math.ceil(self.low / step)
            found = [count * step for count in range(first, first + 12)]
        return [float(f"{tick:.6g}") for tick in found if self.low <= tick <= self.high]


def _element(parts: Sequence[str], height: int) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
