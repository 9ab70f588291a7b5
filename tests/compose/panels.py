"""Every query of every panel on the stack's Prometheus: what it said at rest, and what it says under load."""

from __future__ import annotations

import json
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from headrace_client.dashboards.boards import BOARDS
from headrace_core.testing.async_test import WAIT_S

from tests.load.queries import assert_numbers

WINDOW = "1m"
_PAUSE_S = 4.0
Answer = dict[str, float]
"""Values by the labels that they have."""


def query(address: str, promql: str) -> list[dict[str, Any]]:
    """Return the vector that a query gives now."""
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': promql})}"
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        return json.load(answer)["data"]["result"]


def total(address: str, promql: str) -> float:
    """Return the sum of what a query gives; 0 where that is nothing."""
    return sum(float(sample["value"][1]) for sample in query(address, promql))


@dataclass
class Row:
    """One query of a panel. `changed`: of the answers that differ from that at rest, the one with the largest value."""

    board: str
    panel: str
    legend: str
    promql: str
    at_rest: Answer = field(default_factory=dict[str, float])
    changed: Answer | None = None


def rows() -> Iterator[Row]:
    """Yield the queries that the dashboards show, with a window instead of Grafana's variable."""
    for board in BOARDS:
        for panel in board.panels:
            for each in panel.queries:
                promql = each.promql.replace("$__rate_interval", WINDOW).replace("$layer", "1")
                yield Row(board.name, panel.title, each.legend, promql)


class Watch(threading.Thread):
    """Asks every query of the dashboards again and again, from rest on."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._ended = threading.Event()
        self.rows = list(rows())
        self.failure: AssertionError | None = None
        for row in self.rows:
            row.at_rest = self._ask(row)

    def run(self) -> None:
        """Ask until `end`."""
        try:
            while not self._ended.wait(_PAUSE_S):
                for row in self.rows:
                    now = self._ask(row)
                    if now != row.at_rest and _largest(now) >= _largest(row.changed or {}):
                        row.changed = now
        except AssertionError as error:
            self.failure = error

    def end(self) -> list[Row]:
        """Return every query; raise what an answer had wrong."""
        self._ended.set()
        self.join()
        if self.failure:
            raise self.failure
        return self.rows

    def _ask(self, row: Row) -> Answer:
        found = query(self._address, row.promql)
        assert_numbers(row.promql, found)
        return {
            " ".join(f"{name}={value}" for name, value in sorted(sample["metric"].items())): float(sample["value"][1])
            for sample in found
        }


def _largest(answer: Answer) -> float:
    return max(answer.values(), default=0.0)


def in_words(answer: Answer | None) -> str:
    """Return an answer in a few words: how many series, and from which to which value."""
    if not answer:
        return "nothing"
    low, high = min(answer.values()), max(answer.values())
    values = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    return values if len(answer) == 1 else f"{len(answer)} series, {values}"
