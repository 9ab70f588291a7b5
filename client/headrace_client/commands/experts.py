"""`headrace experts`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from headrace_core.errors import InvalidRequestError, NotFoundError

from headrace_client.client import Client
from headrace_client.commands import options
from headrace_client.commands.terminal import stdout, write_text
from headrace_client.experts.counted import Counted, counted
from headrace_client.experts.outlook import Outlook, outlook
from headrace_client.experts.picture import picture
from headrace_client.top.history import take_look
from headrace_client.top.samples import Samples

HELP = """Draw how evenly experts are used, what that costs, and what a rebalance would win.

Examples:
  headrace experts
  headrace experts --ranks 8 --redundant 8
  headrace experts --worker 127.0.0.1:50052 --all
  headrace experts --page saved.txt --json      (of a page of metrics, saved before: nothing is asked)

Of a worker that is a group of ranks with whole experts (EP) it is where experts are and how long its ranks wait; of \
any other, what a group of --ranks would lose, by the tokens that its experts got since it began. A loss is said both \
ways: a quarter of the time lost is a third more time. Counts are read from the worker's metrics, as `top` does.
"""


def experts(
    router: options.Router,
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Of which worker. Default: a group of ranks, else the one with the most tokens."
        ),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A worker's /metrics in a file, in place of a running one.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Ranks of a group. Default: the worker's; 4 of one process.")
    ] = None,
    redundant: Annotated[
        int | None,
        typer.Option(min=0, help="Copies of experts, over all ranks. Default: the worker's; or one for each rank."),
    ] = None,
    is_whole: Annotated[bool, typer.Option("--all", help="Show every layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the command. Raises what `Client.server_info` lists; `app` reports it."""
    if page is not None:
        found = _of_page(page)
    else:
        with router.connect() as client:
            found = _of_worker(client, worker)
    seen = outlook(found, ranks, redundant)
    if as_json:
        write_text(json.dumps(_plain(found, seen), indent=2) + "\n")
        return
    for line in picture(found, seen, stdout.width, is_whole=is_whole):
        stdout.print(line, no_wrap=True, crop=False)


def _of_page(page: Path) -> Counted:
    try:
        return counted(Samples.of(page.read_text(), 0.0), str(page))
    except (OSError, ValueError) as error:
        raise InvalidRequestError("BAD_OPTION", f"--page {page}: {error}") from None


def _of_worker(client: Client, worker: str | None) -> Counted:
    """Return what the worker says; of several a group before one process, and then the one that has counted most.

    Raises:
        NotFoundError: NO_EXPERTS, none has, or their metrics can't be read.
    """
    look = take_look(client, time.monotonic())
    names = {each.address for each in look.info.workers}
    if worker is not None and worker not in names:
        known = ", ".join(sorted(names)) or "none"
        raise InvalidRequestError("BAD_OPTION", f"--worker {worker}: the router has {known}")
    wanted = [name for name in names if name in look.processes and worker in (None, name)]
    if not wanted:
        raise NotFoundError("NO_EXPERTS", "no worker's metrics can be read from here; save a page for --page")
    chosen = max(wanted, key=lambda name: _interest(look.processes[name]))
    return counted(look.processes[chosen], chosen)


def _interest(samples: Samples) -> tuple[bool, float]:
    """Return what makes a worker the one that is meant: it is a group that has counted, and how many tokens it has."""
    tokens = samples.total("headrace_expert_tokens_total")
    return tokens > 0 and samples.total("headrace_ranks") > 1, tokens


def _plain(found: Counted, seen: Outlook) -> dict[str, object]:
    """Return what JSON says: fractions of 1, seconds, tokens, bytes."""
    placed = {
        name: {"loss": each.loss, "time_more": each.time_more, "rank_tokens": each.rank_tokens}
        for name, each in (("now", seen.now), ("rebalanced", seen.rebalanced))
    }
    return {
        "worker": found.worker,
        "worker_ranks": found.num_ranks,
        "expert_tokens": found.tokens,
        "rebalances": found.rebalances or {},
        "moved_experts": found.moved_experts,
        "moved_bytes": found.moved_bytes,
        "ranks": seen.num_ranks,
        "slots": seen.num_slots,
        "is_measured": seen.is_measured,
        **placed,
        "step_s": asdict(seen.step) if seen.step else None,
    }
