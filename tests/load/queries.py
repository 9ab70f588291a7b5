"""The queries of docs/metrics.md and of the dashboards, for who tries them on a live Prometheus."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_client.dashboards.boards import BOARDS

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
OWNERS = {
    "Router": ["router"],
    "Prefill workers": ["prefill"],
    "Decode workers": ["decode"],
    "Every process": ["router", "prefill", "decode"],
}
"""Who exports what a section lists; what the others list, every worker does."""
_ROW = re.compile(r"\| `((?:headrace|process)_\w+)` \| ([\w, ]*) \| [^|]* \| .* \| `(.+)` \|$")


@dataclass(frozen=True)
class Documented:
    name: str
    labels: frozenset[str]
    query: str
    roles: frozenset[str]


def documented() -> list[Documented]:
    found, section = [], ""
    for line in DOCS.read_text().splitlines():
        if line.startswith("### "):
            section = line.removeprefix("### ")
        elif line.startswith(("| `headrace_", "| `process_")):
            row = _ROW.match(line)
            assert row, f"not as the others: {line}"
            labels = frozenset(filter(None, row[2].replace(" ", "").split(",")))
            found.append(Documented(row[1], labels, row[3], frozenset(OWNERS.get(section, ["prefill", "decode"]))))
    return found


ROWS = documented()
QUERIES = [row.query for row in ROWS] + [
    query.promql.replace("$__rate_interval", "5m").replace("$layer", "1")
    for board in BOARDS
    for panel in board.panels
    for query in panel.queries
]


def assert_numbers(query: str, found: list[dict[str, Any]]) -> None:
    for sample in found:
        assert math.isfinite(float(sample["value"][1])), (query, sample)
