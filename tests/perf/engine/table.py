"""The report of the engine's bench as it is read in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.perf.engine.summary import OURS, key_of


def table(report: Mapping[str, Any]) -> str:
    """Return ms of every engine beside the floor, our ratio to the best peer, and the same of the layer of experts."""
    engines: Mapping[str, Mapping[str, float] | None] = report["engines_ms"]
    lines = [
        _row(
            "",
            "floor",
            *(name.removeprefix("headrace --numerics ").removeprefix("headrace --weights-dtype ") for name in engines),
            "× floor",
            "best peer",
            "of its time",
            "loaded / quiet",
        )
    ]
    for what, least in report["floor_ms"].items():
        key = key_of(what)
        if what not in (engines[OURS] or {}):
            continue
        ratio = report[f"{key}_vs_best"]
        if ratio and what.startswith("prefill"):
            ratio = 1 / ratio
        lines.append(
            _row(
                f"{what}, ms",
                f"{least:,.1f}",
                *("–" if each is None else f"{each[what]:,.1f}" for each in engines.values()),
                f"{report[f'{key}_vs_floor']:.2f}",
                report["best"][key] or "–",
                "–" if ratio is None else f"{ratio:.2f}",
                f"{report[f'{key}_loaded_vs_quiet']:.1f}" if f"{key}_loaded_vs_quiet" in report else "–",
            )
        )
    layer = report.get("moe_layer")
    if layer:
        lines += ["", _row("experts of a layer", "floor", *layer["kernels_ms"])]
        for tokens, least in layer["floor_ms"].items():
            found = layer["kernels_ms"].values()
            shown = ("–" if each is None else f"{each[tokens]:.2f}" for each in found)
            lines.append(_row(f"{tokens} tokens, ms", f"{least:.2f}", *shown))
    reasons = report["not_measured"] | (layer["not_measured"] if layer else {})
    return "\n".join([*lines, *(f"{name} is not measured: {why}" for name, why in reasons.items())])


def _row(first: str, *rest: str) -> str:
    return f"{first:22}" + "".join(f"  {each:>13}" for each in rest)
