"""`headrace dashboards`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from headrace_client.commands.terminal import stdout
from headrace_client.dashboards.boards import BOARDS

HELP = """Write the dashboards for a Grafana of your own.

Examples:
  headrace dashboards                       into ./dashboards
  headrace dashboards --out /etc/grafana/dashboards

Six files: latency, throughput, hand-off, experts, workers, router. Import them, or let Grafana provision the folder; \
each asks for a Prometheus that scrapes Headrace's processes.
"""


def dashboards(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder to write into; made if it is not there.")] = Path(
        "dashboards"
    ),
) -> None:
    """Run the command."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for board in BOARDS:
            path = out / f"{board.name}.json"
            path.write_text(json.dumps(board.as_json(), indent=2) + "\n")
            stdout.print(f"{path}  {board.title}")
    except OSError as error:
        raise typer.BadParameter(f"{out}: {error.strerror}", param_hint="--out") from None
