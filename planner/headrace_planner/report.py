"""Show a roofline in the terminal, or as JSON: operations by intensity, what limits each, its time, its formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace_core.roofline.formula import evaluate, pretty
from headrace_core.roofline.memory import kv_bytes_per_token_per_gpu, weight_bytes_per_gpu
from headrace_core.roofline.model_shape import Dtype
from headrace_core.roofline.roofline import OperationTime, Roofline
from rich import box
from rich.console import Console
from rich.table import Table

from headrace_planner.compat import CompatSetting, compat_critical_intensities, compat_operations
from headrace_planner.tables import print_table

SUMMARY = {
    "tokens_per_s": "tokens/seconds",
    "tokens_per_s_per_gpu": "tokens/seconds/gpus",
    "cost_per_million_tokens": "cost*gpus/3600*seconds/tokens*1000000",
}
"""What a step's time means for whoever pays; of a whole worker."""

_FORMULAS_WIDTH = 150
"""Columns of a terminal from which formulas stand beside the figures, not below."""

_BOUND_STYLE = {"compute": "magenta", "memory": "cyan", "link": "yellow", "network": "yellow"}


def summary(result: Roofline, kv_dtype: Dtype | None = None) -> dict[str, float]:
    """Return the step's time, throughput, cost, and the memory that it needs on a GPU."""
    load = result.load
    tokens = load.prefill_tokens + load.decode_tokens
    context = load.prefill_context + load.decode_context
    gpus, cost = result.parallel.num_gpus, result.hardware.cost_per_hour
    figures = evaluate(
        tuple(SUMMARY.values()), {"tokens": tokens, "seconds": result.time_s, "gpus": gpus, "cost": cost}
    )
    cache_dtype = kv_dtype or result.dtype.activation
    kv_bytes = context / result.parallel.dp * kv_bytes_per_token_per_gpu(result.shape, result.parallel, cache_dtype)
    return {
        "time_s": result.time_s,
        **dict(zip(SUMMARY, figures, strict=True)),
        "weight_bytes_per_gpu": weight_bytes_per_gpu(result.shape, result.parallel, result.dtype),
        "kv_bytes_per_gpu": kv_bytes,
        "kv_transfer_s": result.overlapped_s,
    }


def as_json(result: Roofline, kv_dtype: Dtype | None = None) -> dict[str, Any]:
    """Return the roofline as JSON values; sizes and times are the whole step's, of the busiest GPU."""
    return {
        "model": result.shape.name,
        "hardware": result.hardware.name,
        "parallelism": {"tp": result.parallel.tp, "dp": result.parallel.dp, "ep": result.parallel.ep},
        "dtype": result.dtype.value,
        "critical_intensity": result.hardware.critical_intensity(result.dtype),
        "summary": summary(result, kv_dtype),
        "operations": [
            {
                "name": row.name,
                "runs": row.operation.runs,
                "flops": row.operation.flops,
                "bytes": row.operation.bytes,
                "comm_bytes": row.operation.comm_bytes,
                "intensity": row.intensity,
                "bound": row.bound,
                "time_s": row.time_s,
                "share": row.share,
                "flops_formula": row.operation.formula.flops,
                "bytes_formula": row.operation.formula.bytes,
                "comm_formula": row.operation.formula.sent,
            }
            for row in result.operations
        ],
    }


_COLUMNS = (
    (96, ("operation", "runs", "FLOP", "bytes", "sent", "FLOP/B", "bound", "time", "share")),
    (80, ("operation", "FLOP", "bytes", "bound", "time", "share")),
    (0, ("operation", "bound", "time", "share")),
)
"""The narrowest terminal, in characters, that a table has these columns on."""


def print_roofline(
    console: Console, title: str, result: Roofline, *, has_formulas: bool = True, kv_dtype: Dtype | None = None
) -> None:
    """Print one step: a table of operations, the least intense first, then what it adds up to."""
    hardware, dtype = result.hardware, result.dtype
    peaks = " · ".join(f"{d.value} {hardware.flops_per_s(d) / 1e12:,.4g} TFLOP/s" for d in {dtype.activation, dtype})
    console.print(f"[bold]{title}[/bold]  {result.shape.name} on {hardware.name}, {result.parallel}, {dtype.value}")
    console.print(
        f"[dim]{peaks} · {hardware.memory_bytes_per_s / 1e9:,.4g} GB/s · memory-bound below "
        f"{hardware.critical_intensity(dtype.activation):.2f} FLOP/byte in {dtype.activation.value}[/dim]"
    )
    console.print(_table(result.operations, console.width, has_formulas=has_formulas))
    if console.width < _COLUMNS[0][0]:
        console.print("[dim]This terminal is too narrow for all columns; --json has them.[/dim]")
    if has_formulas and console.width < _FORMULAS_WIDTH:
        console.print("[bold]each time it runs: FLOPs | bytes | sent[/bold]")
        console.print(_formula_list(result.operations))
    console.print(_totals(result, kv_dtype))
    console.print()


def _table(rows: Sequence[OperationTime], width: int, *, has_formulas: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    names = next(names for least, names in _COLUMNS if width >= least)
    for name in names:
        table.add_column(name, justify="left" if name in ("operation", "bound") else "right", no_wrap=True)
    is_wide = width >= _FORMULAS_WIDTH
    if has_formulas and is_wide:
        table.add_column("each time it runs: FLOPs | bytes | sent", style="dim", overflow="fold")
    for row in sorted(rows, key=lambda row: row.intensity):
        operation = row.operation
        cells = {
            "operation": row.name,
            "runs": str(operation.runs),
            "FLOP": si(operation.flops),
            "bytes": si(operation.bytes),
            "sent": si(operation.comm_bytes),
            "FLOP/B": f"{row.intensity:,.2f}",
            "bound": f"[{_BOUND_STYLE[row.bound]}]{row.bound}[/]",
            "time": seconds(row.time_s),
            "share": "beside" if operation.is_overlapped else f"{row.share:.1%}",
        }
        table.add_row(*(cells[name] for name in names), *([_formulas(row)] if has_formulas and is_wide else []))
    return table


def _formula_list(rows: Sequence[OperationTime]) -> Table:
    table = Table.grid(padding=(0, 2))
    for row in sorted(rows, key=lambda row: row.intensity):
        table.add_row(row.name, f"[dim]{_formulas(row)}[/dim]")
    return table


def _formulas(row: OperationTime) -> str:
    formula = row.operation.formula
    return " | ".join(pretty(part) for part in (formula.flops, formula.bytes, formula.sent) if part != "0")


def _totals(result: Roofline, kv_dtype: Dtype | None) -> str:
    figures = summary(result, kv_dtype)
    bounds = ", ".join(f"{share:.0%} {bound}" for bound, share in result.shares_by_bound().items() if share > 0.004)
    held = figures["weight_bytes_per_gpu"] + figures["kv_bytes_per_gpu"]
    is_too_much = held > result.hardware.memory_bytes
    fits = f"[red]does not fit {result.hardware.memory_bytes / 2**30:.0f} GiB[/red]" if is_too_much else "fits"
    lines = [
        f"  [bold]{seconds(result.time_s)}[/bold] a step at the roof: {bounds}",
        f"  {figures['tokens_per_s']:,.0f} tokens/s, {figures['tokens_per_s_per_gpu']:,.0f} per GPU, "
        f"${figures['cost_per_million_tokens']:.4f} per million at ${result.hardware.cost_per_hour}/h",
        f"  per GPU {si(figures['weight_bytes_per_gpu'])}B of weights + {si(figures['kv_bytes_per_gpu'])}B of cache: "
        f"{fits}",
    ]
    if result.overlapped_s:
        hidden = "hidden behind the step" if result.overlapped_s <= result.time_s else "longer than the step"
        lines.append(f"  KV transfer {seconds(result.overlapped_s)}: {hidden}")
    return "\n".join(lines)


def print_compat(console: Console, setting: CompatSetting) -> None:
    """Print the MoE-intensity page's figures by its own formulas."""
    console.print("[bold]The MoE-intensity page's own formulas[/bold]; what they leave out: docs/roofline.md")
    critical = [[name, f"{intensity:.2f}"] for name, intensity in compat_critical_intensities().items()]
    print_table(console, ("hardware", "critical FLOP/byte"), critical)
    rows: list[list[str]] = []
    pairs = zip(compat_operations("prefill", setting), compat_operations("sampling", setting), strict=True)
    for prefill, sampling in pairs:
        formulas = f"{pretty(prefill.flops_formula)} | {pretty(prefill.bytes_formula)}"
        if sampling.flops_formula != prefill.flops_formula:
            formulas += f"; sampling {pretty(sampling.flops_formula)} | {pretty(sampling.bytes_formula)}"
        rows.append([prefill.name, f"{prefill.intensity:.2f}", f"{sampling.intensity:.2f}", formulas])
    columns = ("operation", "prefill FLOP/byte", "sampling FLOP/byte", "FLOPs | bytes")
    print_table(console, columns, rows, left=columns[3:])


def si(value: float) -> str:
    """Return a quantity with a decimal prefix: `1.25 G`."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def seconds(value: float) -> str:
    """Return a time in the unit that suits it."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"
