"""The table of docs/benchmarks.md: what was served and what was simulated, first rates and then latencies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace_planner.sim_workloads import SLO, WORKLOADS, Simulated, bounds_of

DOCS = Path(__file__).parents[3] / "docs/benchmarks.md"
BEGIN, END = "<!-- workloads: begin -->", "<!-- workloads: end -->"
_RATES = ["workload", "model", "load", "requests", "mean in / out", "s", "req/s", "out tok/s", "total tok/s",
          "peak tok/s", "in flight at most", "goodput, req/s", "prefill busy", "sequences a step"]  # fmt: skip
_LATENCIES = ["workload", "model", "TTFT ms: p25 / p50 / p99", "TPOT ms", "mean TPOT", "ITL ms", "mean ITL",
              "E2E s: p25 / p50 / p99", "the roofline's step, ms", "bound by"]  # fmt: skip

Cell = Mapping[str, Any]
"""`model`, `workload`, `load`, `figures`; of what was simulated `busy`, `floor_ms` and `bound`, too."""


def of_simulated(cell: Simulated) -> Cell:
    """Return a simulated cell as the report keeps it."""
    roof = cell.step()
    return {
        "model": cell.model,
        "workload": cell.workload,
        "load": "all at once" if math.isinf(cell.rate) else f"{cell.rate:.1f}/s",
        "rate": None if math.isinf(cell.rate) else cell.rate,
        "figures": cell.figures,
        "busy": {role: cell.result.utilisation(role) for role in ("prefill", "decode")},
        "mean_rows": cell.mean_rows,
        "floor_ms": 1e3 * roof.time_s,
        "bound": bounds_of(roof),
    }


def rate_row(cell: Cell) -> str:
    """Return a cell's row of the first half."""
    figures, count = cell["figures"], cell["figures"]["completed"]
    busy = [f"{cell['busy']['prefill']:.0%}", _short(cell["mean_rows"])] if "busy" in cell else ["", ""]
    return _line(
        [
            cell["workload"], cell["model"], _load(cell), f"{count:,}",
            f"{figures['total_input_tokens'] / count:.0f} / {figures['total_output_tokens'] / count:.0f}",
            _short(figures["duration"]), _short(figures["request_throughput"]),
            _short(figures["output_throughput"]), _short(figures["total_token_throughput"]),
            _short(figures["max_output_tokens_per_s"]), f"{figures['max_concurrent_requests']:,}",
            _short(figures["request_goodput"]), *busy,
        ]
    )  # fmt: skip


def latency_row(cell: Cell) -> str:
    """Return a cell's row of the second half."""
    figures = cell["figures"]
    return _line(
        [
            cell["workload"], cell["model"], _percentiles(figures, "ttft"),
            _percentiles(figures, "tpot"), _short(figures["mean_tpot_ms"]),
            _percentiles(figures, "itl"), _short(figures["mean_itl_ms"]), _percentiles(figures, "e2el", 1e-3),
            _short(cell["floor_ms"]) if "floor_ms" in cell else "", cell.get("bound", ""),
        ]
    )  # fmt: skip


def table(simulated: Sequence[Cell], served: Sequence[Cell]) -> str:
    """Return both halves, workload by workload, first what was simulated."""
    cells = [cell for name in WORKLOADS for cell in (*simulated, *served) if cell["workload"] == name]
    halves: list[str] = []
    for columns, row, words in ((_RATES, rate_row, 3), (_LATENCIES, latency_row, 2)):
        rule = "|" + "|".join("---" if place < words else "--:" for place in range(len(columns))) + "|"
        halves.append("\n".join([_line(columns), rule, *map(row, cells)]))
    return f"{_about(served)}\n\n" + "\n\n".join(halves)


def write(text: str, page: Path = DOCS) -> None:
    """Put the table between its marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def _about(served: Sequence[Cell]) -> str:
    objective = f"Goodput is of requests within TTFT {SLO.ttft_s:g} s and TPOT {1e3 * SLO.itl_s:g} ms."
    if not served:
        return f"Served: not measured. {objective}"
    host = served[0]["machine"]
    loads = [cell["machine"]["load_average"] for cell in served]
    peace = "at real-time priority, beside" if host["is_real_time"] else "beside"
    return (
        f"Served {host['date'][:10]} on {host['cores']} cores of {host['cpu']} ({host['cpu_flags']}), {peace} others' "
        f"work\n(load average before a run {min(loads):.1f} to {max(loads):.1f}), lengths an {served[0]['scale']}th. "
        f"{objective}"
    )


def _load(cell: Cell) -> str:
    if "load" in cell:
        return cell["load"]
    return "all at once" if cell["clients"] is None else f"{cell['clients']} clients"


def _percentiles(figures: Mapping[str, Any], name: str, scale: float = 1.0) -> str:
    return " / ".join(_short(scale * figures[f"p{percent}_{name}_ms"]) for percent in (25, 50, 99))


def _short(value: float) -> str:
    """Return a number with three digits, or all of those before the point."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _line(words: Sequence[str]) -> str:
    return "| " + " | ".join(words) + " |"
