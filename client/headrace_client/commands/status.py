"""`headrace status`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headrace_client.client import Client
from headrace_client.commands import options
from headrace_client.commands.generate import to_plain
from headrace_client.commands.standard_streams import wait
from headrace_client.commands.terminal import LOST_STATES, STATE_STYLES, format_bytes, stdout, write_text
from headrace_client.connection import cause_of
from headrace_client.results import ServerInfo, Worker

HELP = """Show the router's model, its workers, and how full they are.

Examples:
  headrace status
  headrace status --watch
  headrace status --json | jq '.workers[].state'

Pages are the unit of the KV cache. The transport of a decode worker is the one that brought it its last sequence, and \
how fast; of others, those it can use. A lease is a sequence whose pages a prefill worker keeps until a decode worker \
has them. With --watch, --json prints one line per look.
"""


def status(
    router: options.Router,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again until Ctrl-C.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.0, callback=options.finite, help="Seconds between looks, with --watch.")
    ] = 1.0,
) -> None:
    """Run the command. Raises what `Client.server_info` lists; `app` reports it."""
    with router.connect() as client:
        if as_json:
            _print_json(client, interval if watch else None)
        elif not watch:
            stdout.print(_render(client.server_info()))
        else:
            _watch(client, interval)


def _print_json(client: Client, interval_s: float | None) -> None:
    while True:
        info = to_plain(client.server_info())
        write_text(json.dumps(info, indent=2 if interval_s is None else None) + "\n")
        if interval_s is None:
            return
        wait(interval_s)


def _watch(client: Client, interval_s: float) -> None:
    if not stdout.is_terminal:  # which can't go back to where the last look was
        while True:
            stdout.print(_render(client.server_info()))
            wait(interval_s)
    with Live(_render(client.server_info()), console=stdout, auto_refresh=False) as live:
        while True:
            wait(interval_s)
            live.update(_render(client.server_info()), refresh=True)


def _render(info: ServerInfo) -> RenderableType:
    context = f"context {info.max_context_tokens} tokens" if info.max_context_tokens else "no worker is ready yet"
    head = Text.assemble((info.model_name, "bold"), f"  {info.model_fingerprint[:12]}  {context}")
    load = Text(f"{info.num_running} requests running, {info.num_queued} queued; headrace {info.version}", style="dim")
    said = ", ".join(f"{name} {value:g}" for name, value in info.default_sampling.items())
    sampling = Text(f"unless a request says otherwise: {said}" if said else "", style="dim")
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("worker", "role", "state", "transport"):
        table.add_column(name)
    for name in ("pages used", "running", "waiting", "leases"):
        table.add_column(name, justify="right")
    for worker in info.workers:
        table.add_row(*_row(worker))
    details = [Text(f"{worker.address}: {cause_of(worker.detail)}") for worker in info.workers if worker.detail]
    return Group(head, load, *([sampling] if said else []), "", table if info.workers else Text("no workers"), *details)


def _row(worker: Worker) -> tuple[RenderableType, ...]:
    used = f"{worker.num_pages - worker.num_free_pages} / {worker.num_pages}"
    counts = (used, str(worker.num_running), str(worker.num_waiting), str(worker.num_leases))
    return (
        worker.address,
        worker.role or "?",
        _state(worker),
        _transport(worker),
        # What a lost worker last said about itself holds no longer.
        *(("-",) * len(counts) if worker.state in LOST_STATES else counts),
    )


def _state(worker: Worker) -> Text:
    if worker.circuit == "closed":
        return Text(worker.state, style=STATE_STYLES.get(worker.state, ""))
    return Text(f"{worker.state}, circuit {worker.circuit}", style="yellow")


def _transport(worker: Worker) -> str:
    if worker.transport_in_use and worker.state not in LOST_STATES:
        return f"{worker.transport_in_use} {format_bytes(worker.transfer_bytes_per_s)}/s"
    return ", ".join(worker.transports) or "-"
