"""What the served bench says: each deployment of ours beside vLLM's server, and as it is read in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PEER = "vllm"
_NAMES = ("tokens_per_s", "itl_p99", "ttft_p99")


def ratios(cells: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, float | None]:
    """Return ours ÷ vLLM's by key such as `both_c8_itl_p99_vs_vllm`; None where vLLM was not measured.

    Above 1 is better of tokens_per_s, below 1 of the two times.
    """
    found: dict[str, float | None] = {}
    for name, by_clients in cells.items():
        if name == PEER:
            continue
        for clients, ours in by_clients.items():
            theirs = cells.get(PEER, {}).get(clients)
            for what in _NAMES:
                ratio = _value(ours, what) / _value(theirs, what) if theirs else None
                found[f"{name}_c{clients}_{what}_vs_{PEER}"] = None if ratio is None else round(ratio, 3)
    return found


def table(report: Mapping[str, Any]) -> str:
    """Return a line for each server and concurrency."""
    head = ("tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "CPU s/1000")
    lines = [f"{'clients, server; ms':24}" + "".join(f"{each:>12}" for each in head)]
    for clients in next(iter(report["cells"].values()), {}):
        for name, by_clients in report["cells"].items():
            cell = by_clients[clients]
            values = [cell["tokens_per_s"], *(cell[of][p] for of in ("ttft_ms", "itl_ms") for p in ("p50", "p99"))]
            values.append(cell["cpu_s_per_1000_tokens"])
            lines.append(f"{f'{clients}, {name}':24}" + "".join(f"{value:12,.1f}" for value in values))
    return "\n".join([*lines, *(f"{name} is not measured: {why}" for name, why in report["not_measured"].items())])


def _value(cell: Mapping[str, Any], what: str) -> float:
    if what == "tokens_per_s":
        return cell[what]
    return cell[what.replace("_p99", "_ms")]["p99"]
