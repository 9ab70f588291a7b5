"""Panels and dashboards as values, and as Grafana's JSON (schema 39, Grafana 10 and later).

A query may use `$__rate_interval`, which Grafana replaces by a window that has enough scrapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["timeseries", "stat", "status-history"]
"""Lines over time; one number; a row of coloured cells for each series: a heat map."""

_SCHEMA = 39
_COLUMNS = 24
_HEIGHT = 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_HEAT = {"color": {"mode": "continuous-BlYlRd"}, "custom": {"fillOpacity": 100, "lineWidth": 0}}


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and how its series are called: `{{label}}` is a label's value."""

    promql: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture.

    `unit` is one of Grafana's ids: s, bytes, Bps, percentunit, short. `width` is in its 24 columns,
    `text` what to see.
    """

    title: str
    text: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: Kind = "timeseries"
    width: int = 12
    is_stacked: bool = False

    def as_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """Return Grafana's panel, its upper left corner at column `x`, row `y`."""
        custom = {"fillOpacity": 60, "lineWidth": 0, "stacking": {"mode": "normal"}} if self.is_stacked else {}
        defaults = {"unit": self.unit, "min": 0, "custom": custom}
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.text,
            "datasource": _SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": _HEIGHT},
            "fieldConfig": {"defaults": defaults | (_HEAT if self.kind == "status-history" else {}), "overrides": []},
            "options": {"tooltip": {"mode": "multi"}} if self.kind == "timeseries" else {},
            "targets": [
                {
                    "refId": chr(ord("A") + index),
                    "datasource": _SOURCE,
                    "expr": query.promql,
                    "legendFormat": query.legend or "__auto",
                }
                for index, query in enumerate(self.queries)
            ],
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """What the reader may choose at the top: a label's values, of a metric."""

    label: str
    metric: str

    def as_json(self) -> dict[str, Any]:
        """Return Grafana's variable."""
        values = f"label_values({self.metric}, {self.label})"
        return {"name": self.label, "type": "query", "datasource": _SOURCE, "query": values, "refresh": 2, "sort": 3}


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A page of panels, left to right, top to bottom. `name` is its file's and its address'."""

    name: str
    title: str
    panels: Sequence[Panel]
    choices: Sequence[Choice] = ()

    def as_json(self) -> dict[str, Any]:
        """Return Grafana's dashboard."""
        panels: list[dict[str, Any]] = []
        x = y = 0
        for number, panel in enumerate(self.panels, 1):
            if x + panel.width > _COLUMNS:
                x, y = 0, y + _HEIGHT
            panels.append(panel.as_json(number, x, y))
            x += panel.width
        source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
        return {
            "uid": f"headrace-{self.name}",
            "title": f"Headrace: {self.title}",
            "tags": ["headrace"],
            "schemaVersion": _SCHEMA,
            "editable": True,
            "refresh": "5s",
            "time": {"from": "now-15m", "to": "now"},
            "templating": {"list": [source, *(choice.as_json() for choice in self.choices)]},
            "panels": panels,
        }
