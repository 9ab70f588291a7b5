"""The roofline as a web page: one self-contained HTML file that needs no network and no server.

The page has no formulas of its own. Python gives it the very lines of arithmetic that it computes with (`formula`),
the sizes of models, the peaks of hardware and the busiest rank's choice of experts; the page's script evaluates them,
so that sliders are instant and the file works from a disk. A browser test compares the two evaluators.

Sources are in page/: index.html, style.css, and scripts in the order of `_SCRIPTS`; `build_page` puts them together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

from headrace_core.roofline.formula import pretty
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.memory import CACHED_BYTES, weight_bytes_formula
from headrace_core.roofline.model_shape import Dtype, MlaShape, ModelShape
from headrace_core.roofline.operations import DERIVED_SYMBOLS, OperationFormula, operation_formulas, shape_symbols
from headrace_core.roofline.roofline import ROOF
from headrace_core.roofline.routing import Routing
from headrace_core.roofline.step_load import DECODE_LOAD, PREFILL_LOAD, StepLoad

from headrace_planner.measured import MeasuredPoints
from headrace_planner.report import SUMMARY

_T = TypeVar("_T")
_FOLDER = Path(__file__).parent / "page"
_SCRIPTS = ("predict.js", "plot.js", "view.js", "layer.js", "families.js", "app.js")
_EP_DEGREES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ROUTINGS = {
    "uniform": Routing(),
    "Zipf 0.5": Routing(0.5),
    "Zipf 1.0": Routing(1.0),
    "Zipf 1.0, balanced": Routing(1.0, is_balanced=True),
}


@dataclass(frozen=True, slots=True)
class PageSetting:
    """Where the page's controls stand at first; names are those of the address's settings."""

    model: str = "deepseek-v3"
    hardware: str = "h200"
    dtype: str = "fp8"
    batch: int = 512
    prompts: int = 8
    context: int = 4096
    tp: int = 1
    dp: int = 8
    ep: int = 8


@dataclass(frozen=True, slots=True)
class PageContent:
    """What the page offers. `routings` are beside the usual ones and chosen first."""

    models: Mapping[str, ModelShape]
    hardware: Mapping[str, Hardware]
    first: PageSetting
    routings: Mapping[str, Routing] = field(default_factory=dict[str, Routing])
    measured: MeasuredPoints | None = None


def build_page(content: PageContent) -> str:
    """Return the page as HTML with everything inside."""
    html = (_FOLDER / "index.html").read_text(encoding="utf-8")
    parts = {
        "/* style */": (_FOLDER / "style.css").read_text(encoding="utf-8"),
        "/* script */": "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in _SCRIPTS),
        # A closing tag inside a string would end the script element that holds it.
        "/* content */": json.dumps(page_data(content), separators=(",", ":")).replace("</", "<\\/"),
    }
    for placeholder, text in parts.items():
        assert html.count(placeholder) == 1, f"index.html must have one {placeholder}"
        html = html.replace(placeholder, text)
    return html


def page_data(content: PageContent) -> dict[str, Any]:
    """Return what the script works with, as JSON values."""
    rows: list[dict[str, Any]] = []
    tables: list[list[int]] = []
    routings = {**content.routings, **_ROUTINGS}
    return {
        "models": {name: _model(shape, routings, tables, rows) for name, shape in content.models.items()},
        "rows": rows,
        "tables": tables,
        "hardware": {name: _hardware(hardware) for name, hardware in content.hardware.items()},
        "dtypes": {d.value: {"itemsize": d.itemsize, "activation": d.activation.value} for d in Dtype},
        "noLoad": dict.fromkeys(StepLoad.__slots__, 0),
        "loads": {"prefill": PREFILL_LOAD, "decode": DECODE_LOAD},
        "derived": DERIVED_SYMBOLS,
        "roof": ROOF,
        "summary": SUMMARY,
        "routings": list(routings),
        "first": asdict(content.first),
        "measured": content.measured.model_dump() if content.measured else None,
    }


def _model(
    shape: ModelShape, routings: Mapping[str, Routing], tables: list[list[int]], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "symbols": shape_symbols(shape),
        "isMla": isinstance(shape.attention, MlaShape),
        "tables": {
            phase: {path: _table_index(shape, phase, path, tables, rows) for path in ("auto", "naive", "absorbed")}
            for phase in ("prefill", "decode")
        },
        "weightBytes": weight_bytes_formula(shape),
        "cachedBytes": CACHED_BYTES,
        "routing": {name: _routing(shape, routing) for name, routing in routings.items()} if shape.moe else None,
    }


def _table_index(
    shape: ModelShape,
    phase: str,
    path: Literal["auto", "naive", "absorbed"],
    tables: list[list[int]],
    rows: list[dict[str, Any]],
) -> int:
    """Return where `tables` has this model's operations, by their places in `rows`; equal ones are shared."""
    formulas = operation_formulas(shape, has_prefill=phase == "prefill", has_decode=phase == "decode", mla=path)
    return _place([_place(_row(formula), rows) for formula in formulas], tables)


def _place(one: _T, shared: list[_T]) -> int:
    """Return the index of `one`, which is added if nothing equals it."""
    if one not in shared:
        shared.append(one)
    return shared.index(one)


def _row(row: OperationFormula) -> dict[str, Any]:
    shown = {"flops": pretty(row.flops), "bytes": pretty(row.bytes), "sent": pretty(row.sent)}
    return {
        "name": row.name,
        "group": row.group,
        "runs": row.runs,
        "flops": row.flops,
        "bytes": row.bytes,
        "sent": row.sent,
        "span": row.span,
        "choices": row.choices,
        "hops": row.hops,
        "math": row.math,
        "isOverlapped": row.is_overlapped,
        "shown": {name: text for name, text in shown.items() if text != "0"},
    }


def _hardware(hardware: Hardware) -> dict[str, Any]:
    return {
        "flops": {dtype.value: hardware.flops_per_s(dtype) for dtype in Dtype},
        "memory": hardware.memory_bytes_per_s,
        "memoryBytes": hardware.memory_bytes,
        "link": hardware.link_bytes_per_s,
        "network": hardware.network_bytes_per_s,
        "domain": hardware.link_domain,
        "overhead": hardware.operation_overhead_s,
        "start": hardware.collective_start_s,
        "hop": hardware.link_hop_s,
        "networkHop": hardware.network_hop_s,
        "cost": hardware.cost_per_hour,
        "source": hardware.source,
    }


def _routing(shape: ModelShape, routing: Routing) -> dict[str, Any] | None:
    """Return the load of the busiest rank over the mean, and its experts' [probability, how many], for each EP."""
    moe = shape.moe
    if moe is None or (routing.histogram and len(routing.histogram) != moe.num_experts):
        return None
    by_ep: dict[str, Any] = {}
    for ep in _EP_DEGREES:
        if ep <= moe.num_experts:
            busiest = sorted(routing.busiest(moe.num_experts, moe.num_experts_per_token, ep))
            by_ep[str(ep)] = {
                "hot": float(f"{routing.imbalance(moe.num_experts, moe.num_experts_per_token, ep):.9g}"),
                "busiest": [[q, len(list(same))] for q, same in groupby(float(f"{q:.6g}") for q in busiest)],
            }
    return by_ep
