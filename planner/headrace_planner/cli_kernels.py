"""`headrace roofline --kernels`: how near each backend's kernels come to the floor on this machine.

The planner runs without torch; what measures is `headrace_core.worker.kernel_speed`, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from headrace_planner.report import si

_PROGRAM = "headrace_core.worker.kernel_speed"
_BAR_WIDTH = 32
_BESIDE_BAR = 32
"""Columns for a backend's name, its share and its time."""
_STYLES = {"reference": "dim", "cpu": "green"}


class KernelsError(Exception):
    """Nothing could be measured."""


def measure_kernels() -> dict[str, Any]:
    """Measure every family on every backend that runs here, a minute or less on an idle machine; return the report.

    Raises:
        KernelsError: the measuring process failed; with its last line.
    """
    done = subprocess.run([sys.executable, "-P", "-m", _PROGRAM], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        hint = ": kernels need the extra `worker`" if "No module named" in last else ""
        raise KernelsError(f"kernels can't be measured: {last}{hint}")
    return json.loads(done.stdout.splitlines()[-1])


def show_kernels(console: Console, report: Mapping[str, Any]) -> None:
    """Draw each case's throughput by backend as a part of what the floor allows; a full bar is the floor."""
    threads, isa = report["threads"], report["isa"] or "no compiled kernels"
    console.print(
        f"This CPU, {threads} threads, {isa}: reads {si(report['bytes_per_s'])}B/s, multiplies "
        f"{si(report['flops_per_s'])}FLOP/s. A full bar is the floor; bfloat16."
    )
    width = max(8, min(_BAR_WIDTH, console.width - _BESIDE_BAR))
    reasons: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for case in report["cases"]:
        floor = f"floor {case['floor_s'] * 1e6:,.0f} µs, {case['bound']}"
        console.print(Text.assemble("\n", (case["family"], "bold"), f"  {case['shape']}  ", (floor, "dim")))
        for name, found in case["backends"].items():
            console.print(Text.assemble(f"  {name:10} ", *_drawn(name, found, width)))
            if "not_measured" in found:
                reasons[name][found["not_measured"]] = None
    console.print()
    for name, why in reasons.items():
        console.print(f"{name}, where it is not measured: {'; '.join(why)}")


def _drawn(name: str, found: Mapping[str, Any], most: int) -> tuple[tuple[str, str], ...]:
    if "share" not in found:
        return (("not measured", "dim"),)
    share: float = found["share"]
    width = min(most, max(1, round(most * share)))
    time = f" {share:4.0%}  {found['s'] * 1e6:,.0f} µs"
    return ("█" * width, _STYLES.get(name, "cyan")), ("░" * (most - width), "dim"), (time, "")
