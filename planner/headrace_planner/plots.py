"""Plots: small SVG files. matplotlib is an optional extra; without it the error says so.

Every figure is lines over one axis: a `Figure` says what, `save` draws it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from headrace_core.errors import InvalidRequestError, StartupError

_COLOURS = ("#0b6e99", "#d9480f", "#5f3dc4", "#2b8a3e", "#868e96", "#c2255c")
_DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True, slots=True)
class Line:
    """One line. `style` picks a dash pattern; lines of the same `colour` belong together."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int = 0
    colour: int | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """One plot."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    x_log: bool = False
    y_log: bool = False
    marks: Sequence[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    """Vertical lines: x and what they mean."""
    legend: Literal["inside", "beside", "none"] = "inside"
    """Where lines are named; of figures with the same lines the last may do it for all."""


def check(path: Path) -> None:
    """Find out whether `save` could write this file, before what it would draw is computed; makes its folder.

    Raises:
        StartupError: NO_MATPLOTLIB.
        InvalidRequestError: BAD_OPTION, its ending is no format.
        OSError: it can't be written.
    """
    _pyplot()
    backends: Any = importlib.import_module("matplotlib.backend_bases")
    endings = set(backends.FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in endings:
        text = f"{path}: {path.suffix or 'no ending'} is no format of plots; end it in .svg or .png"
        raise InvalidRequestError("BAD_OPTION", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("ab").close()
    if is_new:
        path.unlink()


def save(figures: Sequence[Figure], path: Path) -> None:
    """Draw figures side by side into one file; its ending chooses the format.

    Raises:
        StartupError: NO_MATPLOTLIB.
    """
    pyplot: Any = _pyplot()
    # Text stays text: smaller files, and a browser's own fonts. Fixed salt: the same plot is the same file.
    pyplot.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "headrace"})
    canvas, axes = pyplot.subplots(1, len(figures), figsize=(5.2 * len(figures), 3.6), squeeze=False)
    for figure, axis in zip(figures, axes[0], strict=True):
        _draw(figure, axis)
    canvas.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(canvas)


def _draw(figure: Figure, axis: Any) -> None:
    for index, line in enumerate(figure.lines):
        colour = _COLOURS[(index if line.colour is None else line.colour) % len(_COLOURS)]
        marker = "o" if len(line.xs) <= 24 else ""
        dash = _DASHES[line.style % len(_DASHES)]
        axis.plot(line.xs, line.ys, dash, color=colour, label=line.label, marker=marker, markersize=3, linewidth=1.5)
    for x, text in figure.marks:
        axis.axvline(x, color="#adb5bd", linewidth=0.8)
        axis.annotate(text, (x, 0.02), xycoords=("data", "axes fraction"), fontsize=7, rotation=90, ha="right")
    axis.set_title(figure.title, fontsize=9)
    axis.set_xlabel(figure.x_label)
    axis.set_ylabel(figure.y_label)
    if figure.x_log:
        axis.set_xscale("log", base=2)
    if figure.y_log:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if figure.legend != "none":
        beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        axis.legend(frameon=False, fontsize=7, **(beside if figure.legend == "beside" else {}))


def _pyplot() -> Any:
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        text = "plots need matplotlib, which is not installed: pip install 'headrace[plots]', or leave the plots out"
        raise StartupError("NO_MATPLOTLIB", text) from None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")
