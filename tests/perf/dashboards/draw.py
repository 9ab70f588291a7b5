"""Dashboards drawn with matplotlib from a Prometheus' answers: panels, places, units and legends as Grafana is told."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from headrace_client.dashboards.grafana import Dashboard
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator
from PIL import Image

Series = list[tuple[str, list[float], list[float]]]
"""Name, seconds since the beginning, values; nan where there is none."""
Ask = Callable[[str], list[dict[str, Any]]]
"""What a Prometheus says to a query over the picture's time, as its API has it."""

_WIDTH_IN, _COLUMNS, _ROW_IN = 16.0, 24, 0.36
_INK, _FAINT, _FRAME = "#1f2430", "#707885", "#d9dce1"
_MOST_NAMES, _NAMES_CHARS = 8, 120
"""In a legend and in a line of it, over half of the picture."""
_SUFFIXES = {"s": "s", "bytes": "B", "Bps": "B/s"}
_STEPS = [(1e-9, "n"), (1e-6, "µ"), (1e-3, "m"), (1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G")]


def picture(
    dashboard: Dashboard, ask: Ask, choices: Mapping[str, str], seconds: float, path: Path, footer: str
) -> None:
    """Draw `seconds` of a dashboard into a PNG at `path`; `choices` are what a reader chose at its top."""
    panels = dashboard.as_json()["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    mpl.rcParams.update({"font.size": 8, "axes.edgecolor": _FRAME, "text.color": _INK, "axes.labelcolor": _FAINT})
    height_in = rows * _ROW_IN + 1.3
    figure = Figure(figsize=(_WIDTH_IN, height_in), dpi=80, facecolor="#f4f5f7")
    figure.text(0.012, 1 - 0.36 / height_in, f"Headrace: {dashboard.title}", size=15, weight="bold")
    figure.text(0.012, 0.14 / height_in, "\n".join(textwrap.wrap(footer, 190)), size=8, color=_FAINT)
    for panel in panels:
        place = panel["gridPos"]
        left, width = place["x"] / _COLUMNS, place["w"] / _COLUMNS
        top = 1 - (0.55 + place["y"] * _ROW_IN) / height_in
        height = place["h"] * _ROW_IN / height_in
        frame = figure.add_axes((left + 0.006, top - height + 0.008, width - 0.012, height - 0.012), facecolor="white")
        frame.set(xticks=[], yticks=[])
        frame.set_title(_with(panel["title"], choices), loc="left", size=10, weight="bold", y=1, pad=-14, x=0.012)
        frame.text(0.012, 0.86, panel["description"], size=7.5, color=_FAINT, transform=frame.transAxes, va="top")
        inner = (left + 0.006 + 0.045, top - height + 0.25 * height, width - 0.065, 0.53 * height)
        _draw(figure.add_axes(inner), panel, _series(panel, ask, choices), seconds)
    figure.savefig(path)
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(96).save(path, optimize=True)  # a third of the bytes


def _series(panel: Mapping[str, Any], ask: Ask, choices: Mapping[str, str]) -> Series:
    found: Series = []
    for target in panel["targets"]:
        for each in ask(_with(target["expr"], choices)):
            name = re.sub(r"{{(\w+)}}", lambda label, of=each["metric"]: of.get(label[1], ""), target["legendFormat"])
            at, values = zip(*each["values"], strict=True)
            found.append((name.strip(), list(at), [float(value) for value in values]))
    return sorted(
        found, key=lambda each: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", each[0])]
    )


def _with(text: str, choices: Mapping[str, str]) -> str:
    for name, value in choices.items():
        text = text.replace(f"${name}", value)
    return text


def _draw(axes: Axes, panel: Mapping[str, Any], series: Series, seconds: float) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_FAINT, length=2)
    axes.xaxis.set_major_locator(MultipleLocator(30))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{int(s) // 60}:{int(s) % 60:02d}"))
    axes.set_xlim(0, seconds)
    if not series:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", ha="center", color=_FAINT, transform=axes.transAxes)
        return
    axes.set_prop_cycle(color=mpl.colormaps["tab10" if len(series) <= 10 else "tab20"].colors)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "status-history":
        _heat(axes, series)
        return
    if panel["fieldConfig"]["defaults"]["custom"].get("stacking"):
        at = sorted({moment for _, moments, _ in series for moment in moments})
        filled = [dict(zip(moments, values, strict=True)) for _, moments, values in series]
        heights = [[0.0 if math.isnan(of.get(moment, 0.0)) else of.get(moment, 0.0) for moment in at] for of in filled]
        axes.stackplot(at, heights, labels=[name for name, _, _ in series], alpha=0.75, lw=0)
    else:
        for name, at, values in series:
            axes.plot(at, values, label=name, lw=1.3)
    axes.set_ylim(0, None if any(value > 0 for _, _, values in series for value in values) else 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value, unit)))
    axes.grid(axis="y", color=_FRAME, lw=0.6)
    lines, names = axes.get_legend_handles_labels()
    share = panel["gridPos"]["w"] * 2 // _COLUMNS
    most, room = _MOST_NAMES * share, _NAMES_CHARS * share
    shown = names[:most]
    if len(names) > most:
        shown[-1] += f" and {len(names) - most} more"
    axes.legend(
        lines[:most], shown, loc="upper left", bbox_to_anchor=(-0.02, -0.14), frameon=False, fontsize=7,
        ncols=max(1, room // (max(map(len, shown)) + 6)), columnspacing=1, handlelength=1,
    )  # fmt: skip


def _heat(axes: Axes, series: Series) -> None:
    """A row of cells for each series, blue where its value is low and red where it is high."""
    at = sorted({moment for _, moments, _ in series for moment in moments})
    rows: list[Sequence[float]] = []
    for _, moments, values in series:
        of = dict(zip(moments, values, strict=True))
        rows.append([of.get(moment, math.nan) for moment in at])
    mesh = axes.pcolormesh(at, range(len(series)), rows, cmap="RdYlBu_r", vmin=0, shading="nearest")
    axes.set_yticks(range(0, len(series), max(1, len(series) // 8)))
    axes.set_yticklabels([series[index][0] for index in axes.get_yticks().astype(int)])
    axes.figure.colorbar(mesh, ax=axes, pad=0.01, aspect=12)


def _number(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value:.0%}"
    if not value:
        return "0"
    scale, prefix = max((step for step in _STEPS if step[0] <= abs(value) * 1.0000001), default=_STEPS[0])
    if (unit == "s") == (scale > 1):  # there are milliseconds, and no kiloseconds; thousands, and no thousandths
        scale, prefix = 1.0, ""
    return f"{value / scale:.3g} {prefix}{_SUFFIXES.get(unit, '')}".strip()
