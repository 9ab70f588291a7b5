"""`make bench-served`: the whole system beside vLLM's server on the same cores, taking turns; build/bench/served.json.

    python -m tests.perf.served build/checkpoint-280m --concurrency 1 8 32

All servers run throughout and take turns: at each concurrency, round by round, one is asked by that many clients, each
with its next prompt as soon as it has its answer, while the others are idle. Prompts are random, so that none shares a
prefix with another. `apart` is one prefill and one decode worker with half of the cores each, `both` one worker that
does both with all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headrace_client.cluster.cores import available_cores
from headrace_core.roofline.model_shape import ModelShape
from headrace_router.testing import write_tokenizer

from tests.perf.closed_loop import RequestTimes, cell_figures, closed_loop, random_prompts
from tests.perf.engine.peer import NoPeerError, peers_dtype
from tests.perf.machine import machine
from tests.perf.served.servers import Load, Server, apart, together, vllm
from tests.perf.served.summary import ratios, table

_log = logging.getLogger(__name__)
_REPORT = Path("build/bench/served.json")

Deployment = Callable[[Load], contextlib.AbstractAsyncContextManager[Server]]


class Cell:
    """What was measured of one server at one concurrency, over all rounds."""

    def __init__(self) -> None:
        self.times: list[RequestTimes] = []
        self.wall_s = 0.0
        self.cpu_s = 0.0

    async def measure(self, server: Server, prompts: list[list[int]], clients: int) -> None:
        """Ask once more with these prompts."""
        before_cpu_s, begin_s = server.cpu_s(), time.monotonic()
        self.times += await closed_loop(server.ask, prompts, clients)
        self.wall_s += time.monotonic() - begin_s
        self.cpu_s += server.cpu_s() - before_cpu_s

    def figures(self, load: Load, clients: int) -> dict[str, Any]:
        """Return percentiles, throughput and CPU time, and every sample they come from."""
        return {
            **cell_figures((load.num_in, load.num_out), clients, self.times, self.wall_s),
            "cpu_s_per_1000_tokens": 1000 * self.cpu_s / sum(each.num_tokens for each in self.times),
            "samples_s": [[round(at, 5) for at, _ in each.deltas] for each in self.times],
        }


async def _run(load: Load, deployments: Mapping[str, Deployment], options: argparse.Namespace) -> dict[str, Any]:
    vocab_size = ModelShape.load(load.checkpoint).vocab_size
    why_not: dict[str, str] = {}
    cells: dict[str, dict[int, Cell]] = defaultdict(lambda: defaultdict(Cell))
    async with contextlib.AsyncExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, serve in deployments.items():
            _log.info("starting %s", name)
            try:
                servers[name] = await stack.enter_async_context(serve(load))
            except NoPeerError as error:
                why_not[name] = str(error)
                _log.info("%s is not measured: %s", name, error)
        sizes = (load.num_in, load.num_out)
        for clients in options.concurrency:
            for server in servers.values():  # what a server meets for the first time does not count
                await closed_loop(server.ask, random_prompts(sizes, vocab_size, clients, seed=-1), clients)
            for number in range(options.rounds):
                prompts = random_prompts(sizes, vocab_size, clients * options.requests, seed=1000 * clients + number)
                for name, server in servers.items():
                    await cells[name][clients].measure(server, prompts, clients)
                    rate = cells[name][clients].figures(load, clients)["tokens_per_s"]
                    _log.info("%d clients, round %d, %s: %.1f tokens/s so far", clients, number + 1, name, rate)
        commands = {name: server.command for name, server in servers.items()}
    found = {name: {n: cell.figures(load, n) for n, cell in each.items()} for name, each in cells.items()}
    return {"not_measured": why_not, "commands": commands, **ratios(found), "cells": found}


def _main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, nargs=2, default=[256, 128], metavar=("IN", "OUT"))
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--servers", nargs="*", choices=["apart", "both", "vllm"], default=["apart", "both", "vllm"])
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="folder of others' engines")
    options = parser.parse_args()
    write_tokenizer(options.checkpoint)
    load = Load(options.checkpoint, *options.tokens, max(options.concurrency), available_cores())
    known: dict[str, Deployment] = {"apart": apart, "both": together, "vllm": vllm(options.peers)}
    found = asyncio.run(_run(load, {name: known[name] for name in options.servers}, options))
    report = {"machine": machine(), "cores": load.cores, "vllm_dtype": peers_dtype(), **found}
    _REPORT.parent.mkdir(parents=True, exist_ok=True)
    _REPORT.write_text(json.dumps(report, indent=1) + "\n")
    _log.info("%s", table(report))
    _log.info("written to %s", _REPORT)


if __name__ == "__main__":
    _main()
