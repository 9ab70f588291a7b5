"""A run as one HTML page that needs nothing else: the block, latencies' distributions, throughput, a waterfall."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from headrace_client.bench.block import block
from headrace_client.bench.figures import LATENCIES, latencies_ms, tokens_per_second
from headrace_client.bench.report import Run
from headrace_client.bench.svg import Chart, Curve

_MOST_POINTS = 400
"""Of a curve: more are not seen."""
_MOST_ROWS = 200
"""Of a waterfall; of more requests every so many-th is drawn."""
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1000px; color: #212529; }
pre { background: #f1f3f5; padding: 1em; overflow-x: auto; }
h2 { margin-top: 2em; } svg { max-width: 100%; height: auto; } .note { color: #868e96; }
svg text { font: 11px system-ui, sans-serif; fill: #495057; }
"""


def page(runs: Sequence[Run], *, title: str, command: str) -> str:
    """Return the page."""
    parts = [_run(run) for run in runs]
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n<pre>{escape(command)}</pre>\n"
        + "\n".join(parts)
        + "</html>\n"
    )


def _run(run: Run) -> str:
    setting = ", ".join(f"{name} {value}" for name, value in run.setting.items() if value is not None)
    note = "" if len(run.records) <= _MOST_ROWS else f" Of {len(run.records)} requests {_MOST_ROWS} are drawn."
    return "\n".join(
        [
            f"<h2>{escape(setting)}</h2>",
            f"<pre>{escape(block(run.figures, run.setting))}</pre>",
            _distributions(run),
            _throughput(run),
            f'<p class="note">A row is a request: grey waits to be sent, orange to its first token, blue decodes; red '
            f"failed.{note}</p>",
            _waterfall(run),
        ]
    )


def _distributions(run: Run) -> str:
    curves: list[Curve] = []
    for name, values in latencies_ms(run.records).items():
        if values:
            shares = np.linspace(0, 1, min(_MOST_POINTS, len(values)))
            at_ms: list[float] = np.quantile(values, shares).tolist()
            curves.append(Curve(name.upper(), list(zip(at_ms, (100 * shares).tolist(), strict=True))))
    assert len(curves) <= len(LATENCIES)
    return Chart("Latencies: how many of 100 are at most so long", "ms", "%", x_log=True).draw(curves)


def _throughput(run: Run) -> str:
    answered = [record for record in run.records if record.is_ok]
    points = [(float(second), float(count)) for second, count in enumerate(tokens_per_second(answered))]
    return Chart("Output tokens in each second", "s", "tokens/s").draw([Curve("tokens/s", points)])


def _waterfall(run: Run) -> str:
    every = -(-len(run.records) // _MOST_ROWS) or 1
    rows = [
        (
            record.intended_s,
            record.sent_s,
            record.deltas[0][0] if record.deltas else record.end_s,
            record.end_s,
            record.is_ok,
        )
        for record in run.records[::every]
    ]
    return Chart("Requests", "s", "").draw_rows(rows)
