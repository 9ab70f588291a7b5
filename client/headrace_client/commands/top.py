"""`headrace top`."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from headrace_core.errors import HeadraceError, InvalidRequestError, UnauthenticatedError
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from headrace_client.client import Client
from headrace_client.commands import options
from headrace_client.commands.standard_streams import wait
from headrace_client.commands.terminal import stdout
from headrace_client.top.frame import render
from headrace_client.top.history import History, View, take_look

HELP = """Watch a router and its workers: latencies, queues, hand-offs, experts.

Examples:
  headrace top
  headrace top --interval 5
  headrace top --once           (one frame, of all since the processes began)

Counts and percentiles are of the last minute, from the metrics that router and workers serve; where those can't be \
read there is a "-". Tokens/s of a worker are those that its steps compute, pages are how full its pool is, hits how \
much of the prompts its prefix cache had. "While moving" is how fast pages move when they do, "hidden" how much of \
them came while their prompt was still being computed. Ctrl-C ends it.
"""


def top(
    router: options.Router,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end; so does a pipe.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, callback=options.finite, help="Seconds between looks.")] = 2.0,
) -> None:
    """Run the command. Raises what `Client.server_info` lists; `app` reports it."""
    with router.connect() as client:
        history = History()
        view = history.add(take_look(client, time.monotonic()))
        if once or not stdout.is_terminal:
            stdout.print(render(view, router.server, width=stdout.width))
        else:
            _watch(client, history, view, interval)


def _watch(client: Client, history: History, view: View, interval_s: float) -> None:
    """Show frames until Ctrl-C, which is how it ends; a router that does not answer is asked again."""
    try:
        with Live(_frame(view, client), console=stdout, screen=True, auto_refresh=False) as live:
            while True:
                wait(interval_s)
                trouble: RenderableType | None = None
                try:
                    view = history.add(take_look(client, time.monotonic()))
                except (InvalidRequestError, UnauthenticatedError):
                    raise
                except HeadraceError as error:
                    trouble = Text(f"{error}; asking again. Below is what was last seen.", style="bold red")
                frame = _frame(view, client, trouble)
                if stdout.is_dumb_terminal:
                    stdout.print(frame)  # which can't go back to where the last one was
                else:
                    live.update(frame, refresh=True)
    except KeyboardInterrupt:
        pass


def _frame(view: View, client: Client, trouble: RenderableType | None = None) -> RenderableType:
    frame = render(view, client.address, width=stdout.width, height=stdout.height)
    return frame if trouble is None else Group(trouble, frame)
