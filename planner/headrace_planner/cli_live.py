"""`headrace roofline --live`: running workers' operations, measured and predicted side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer
from headrace_core.roofline.model_shape import ModelShape
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headrace_planner.live import LiveError, Machine, Reading, live_rows, measured_points, read_worker
from headrace_planner.report import si

_WATCH_INTERVAL_S = 2.0
# From this ratio of measured to predicted on, an operation is worth a look.
_SLOW_RATIO = 3.0
_COLUMNS = ("measured µs", "predicted µs", "ratio", "share", "FLOP", "bytes", "bound")
_NARROW_COLUMNS = _COLUMNS[:3]
_LEAST_WIDTH = 96
"""Columns of a terminal from which all are shown; --json has them all."""
_NO_ADDRESSES = (
    "--live needs --metrics HOST:PORT, once per worker: `headrace up` prints them, and so does the worker's log line "
    "`serving`; the router does not know them"
)


def read_workers(addresses: Sequence[str]) -> list[Reading]:
    """Read each worker's metrics.

    Raises:
        LiveError: There is no address, or a worker can't be read.
    """
    if not addresses:
        raise LiveError(_NO_ADDRESSES)
    return [read_worker(address) for address in addresses]


def save_points(readings: Sequence[Reading], shape: ModelShape, path: Path) -> None:
    """Write measured points for `--measured`.

    Raises:
        LiveError: As `measured_points`.
    """
    points = measured_points(readings, shape)
    path.write_text(points.model_dump_json(indent=1, exclude_none=True) + "\n", encoding="utf-8")


def show_live(console: Console, readings: Sequence[Reading], *, as_json: bool, watch: bool) -> None:
    """Print each worker's table or JSON; with `watch`, again and again, of the steps since the time before.

    Raises:
        LiveError: A worker can't be read any more.
    """
    if as_json:
        typer.echo(json.dumps({"workers": [_as_json(reading) for reading in readings]}, indent=2))
        return
    if not watch:
        console.print(_tables(readings, console.width))
        return
    shown, last = list(readings), list(readings)
    with Live(_tables(shown, console.width), console=console, auto_refresh=False) as screen:
        try:
            while True:
                time.sleep(_WATCH_INTERVAL_S)
                now = read_workers([reading.address for reading in last])
                news = [after.since(before) for after, before in zip(now, last, strict=True)]
                shown = [new if new.loads else old for new, old in zip(news, shown, strict=True)]
                last = now
                screen.update(_tables(shown, console.width), refresh=True)
        except KeyboardInterrupt:
            return


def _as_json(reading: Reading) -> dict[str, Any]:
    machine = reading.machine
    return {
        "metrics": reading.address,
        "machine": machine and {**asdict(machine), "dtype": machine.dtype.value, "kv_dtype": machine.kv_dtype.value},
        "sampled": {phase: asdict(load) for phase, load in reading.loads.items()},
        "operations": [asdict(row) for row in live_rows(reading)],
    }


def _tables(readings: Sequence[Reading], width: int) -> Group:
    return Group(*(part for reading in readings for part in _parts(reading, width)))


def _parts(reading: Reading, width: int) -> list[Text | Table]:
    parts: list[Text | Table] = [_title(reading.address, reading.machine)]
    if not reading.loads:
        return [*parts, Text("  no step was measured yet; one in --roofline-every-steps is\n", style="dim")]
    for phase, load in sorted(reading.loads.items()):
        of_phase = replace(reading, loads={phase: load})
        rows = list(live_rows(of_phase))
        measured, predicted = sum(row.measured_us for row in rows), sum(row.predicted_us or 0.0 for row in rows)
        parts.append(
            Text(
                f"{phase}: mean of {load.num_steps:.0f} steps, {load.num_sequences / load.num_steps:.1f} sequences of "
                f"{load.num_context_tokens / max(load.num_sequences, 1):.0f} tokens; "
                f"{measured:,.0f} µs measured, {predicted:,.0f} µs predicted"
            )
        )
        table = Table("operation", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        table.columns[0].overflow = "fold"
        names = _COLUMNS if width >= _LEAST_WIDTH else _NARROW_COLUMNS
        for name in names:
            table.add_column(name, justify="left" if name == "bound" else "right", no_wrap=True)
        for row in rows:
            style = "red" if row.ratio and row.ratio >= _SLOW_RATIO and row.share >= 1 / len(rows) else ""
            cells = {
                "measured µs": f"{row.measured_us:,.1f}",
                "predicted µs": "" if row.predicted_us is None else f"{row.predicted_us:,.1f}",
                "ratio": "" if row.ratio is None else f"{row.ratio:.2f}",
                "share": f"{row.share:.1%}",
                "FLOP": si(row.flops),
                "bytes": si(row.num_bytes),
                "bound": row.bound,
            }
            table.add_row(row.op, *(cells[name] for name in names), style=style)
        parts.append(table)
    return parts


def _title(address: str, machine: Machine | None) -> Text:
    if machine is None:
        return Text(f"{address}: its machine is being measured", style="bold")
    is_other = machine.kv_dtype is not machine.dtype.activation
    cache = f" with its cache in {machine.kv_dtype.value}" if is_other else ""
    return Text.assemble(
        (f"{address}  ", "bold"),
        f"{machine.model} in {machine.dtype.value}{cache} on {machine.hardware}: {si(machine.flops_per_s)}FLOP/s, "
        f"{si(machine.bytes_per_s)}B/s, {machine.overhead_s * 1e6:.1f} µs an operation",
    )
