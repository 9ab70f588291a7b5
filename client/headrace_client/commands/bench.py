"""`headrace bench` and `headrace bench compare`."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from headrace_core.errors import InvalidRequestError, NotFoundError
from headrace_core.process import raise_file_limit

from headrace_client.bench import compare as comparing
from headrace_client.bench.asked import Dataset, warm_up_of
from headrace_client.bench.block import block
from headrace_client.bench.effects import check_effects
from headrace_client.bench.figures import figures_of
from headrace_client.bench.goodput import Goodput
from headrace_client.bench.grpc_target import GrpcTarget
from headrace_client.bench.http_target import HttpTarget
from headrace_client.bench.load import Arrivals, Load
from headrace_client.bench.page import page
from headrace_client.bench.progress import shown
from headrace_client.bench.prompts import Session
from headrace_client.bench.record import Record
from headrace_client.bench.report import Run, encode_report, read_report
from headrace_client.bench.stopping import Stop, stopping
from headrace_client.bench.target import Target
from headrace_client.commands import hints, options
from headrace_client.commands.bench_options import Asked, Output, Server, When
from headrace_client.commands.help_page import Group
from headrace_client.commands.option_groups import spread
from headrace_client.commands.terminal import check_writable, complain, stderr, write_file, write_text

HELP = """Put load on a server and say what its clients saw.

Examples:
  headrace bench --dataset conversation --concurrency 8
  headrace bench --dataset random --input-tokens 512 --output-tokens 64 --request-rate 4 --goodput ttft:500,itl:50
  headrace bench --dataset multi-turn --concurrency 1,4,16 --json a.json --html a.html
  headrace bench --trace conversation_trace.jsonl --num-requests 500 --length-scale 16 --time-scale 2
  headrace bench --base-url http://127.0.0.1:8000 --concurrency 32     (any server with OpenAI's API)
  headrace bench compare a.json b.json

A rate, or a trace's own times, make an open loop: requests come when they are due, and latencies count from then. \
--concurrency alone makes a closed one. Without any of these, all requests come at once. Ctrl-C ends a run early and \
keeps what was answered. docs/bench.md says more.
"""

COMPARE_HELP = """Say whether the runs of two reports differ, with 95 % intervals (bootstrap over requests).

Examples:
  headrace bench compare before.json after.json
"""

app = typer.Typer(cls=Group, invoke_without_command=True, add_completion=False)


@app.callback(help=HELP)
@spread
def bench(
    context: typer.Context, asked: Asked, when: When, output: Output, server: Server, router: options.Router
) -> None:
    """Run the command. Raises what is wrong with its options; what a server refuses is a request that failed."""
    if context.invoked_subcommand is not None:
        return
    check_effects(
        _given(context), dataset=asked.dataset, has_trace=asked.trace is not None,
        has_rate=when.request_rate is not None, is_http=server.base_url is not None,
    )  # fmt: skip
    for path in filter(None, (output.as_json, output.as_html)):
        check_writable(path)
    bench_of = _Bench(asked.of_dataset(), when.levels(asked.seed), output.limits(), when.warm_up, asked.vocab_size)
    with router.connect() as client:
        connection = client.options
    if server.base_url is not None:
        hints.server_option.set(hints.HTTP_OPTION)
    wants_ids = asked.trace is None and asked.dataset == "multi-turn"
    http = server.over_http(connection.api_key, router.tls_roots, wants_ids=wants_ids)

    async def target() -> Target:
        if server.base_url is None:
            _check_served(router, server.model)
            return GrpcTarget(router.server, connection, model=server.model, timeout_s=server.timeout)
        over_http = HttpTarget(server.base_url, http)
        await over_http.start()
        return over_http

    raise_file_limit()  # a connection is a file
    runs = uvloop.run(bench_of.run(target))
    command = shlex.join(["headrace", *sys.argv[1:]])
    name = server.base_url or router.server
    if output.as_json is not None:
        write_file(output.as_json, json.dumps(encode_report(runs, command=command, target=name)) + "\n")
    if output.as_html is not None:
        write_file(output.as_html, page(runs, title=f"headrace bench: {name}", command=command))
    if bench_of.stop.by is not None:
        raise typer.Exit(128 + bench_of.stop.by)
    if not any(run.figures["completed"] for run in runs):
        raise typer.Exit(1)


@app.command(help=COMPARE_HELP)
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="What --json wrote.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.")],
) -> None:
    """Run the command.

    Raises:
        InvalidRequestError: BAD_REPORT.
    """
    pair = read_report(first), read_report(second)
    if len(pair[0]) != len(pair[1]):
        raise InvalidRequestError("BAD_REPORT", f"{first} has {len(pair[0])} runs, {second} {len(pair[1])}")
    for before, after in zip(*pair, strict=True):
        told = [_shown(before.setting), *comparing.cautions(before, after)]
        write_text("\n".join([*told, comparing.table(comparing.differences(before, after))]) + "\n\n")


@dataclasses.dataclass(frozen=True, slots=True)
class _Bench:
    asked: Dataset
    levels: Sequence[Arrivals]
    goodput: Goodput | None
    num_warm_up: int
    vocab_size: int
    stop: Stop = dataclasses.field(default_factory=Stop)

    async def run(self, connect: Any) -> list[Run]:
        """Run every level, print its block, and return them."""
        levels = [dataclasses.replace(self.asked, seed=self.asked.seed + place) for place in range(len(self.levels))]
        asked = [level.sessions() for level in levels]  # each other prompts: caches know nothing of them
        for sessions, arrivals in zip(asked, self.levels, strict=True):
            arrivals.check(sessions)
        target: Target = await connect()
        runs: list[Run] = []
        try:
            for sessions, arrivals in zip(asked, self.levels, strict=True):
                if self.num_warm_up:
                    await self._warm_up(target, sessions, arrivals)
                if self.stop.by is None:
                    runs.append(await self._level(target, sessions, arrivals))
                if self.stop.by is not None:
                    break
        finally:
            await target.close()
        return runs

    async def _level(self, target: Target, sessions: Sequence[Session], arrivals: Arrivals) -> Run:
        load = Load(target, sessions, arrivals, vocab_size=self.vocab_size)
        records = await self._run(load)
        setting = {
            "dataset": self.asked.trace.name if self.asked.trace else self.asked.name,
            "length_scale": None if self.asked.length_scale == 1 else self.asked.length_scale,
            "rate": None if arrivals.rate is None or math.isinf(arrivals.rate) else arrivals.rate,
            "concurrency": arrivals.concurrency,
            "burstiness": _burstiness(arrivals),
        }
        figures = figures_of(records, self.goodput)
        if load.tally.is_interrupted:
            not_sent = load.tally.num_requests - load.tally.num_sent
            figures["interrupted"] = {"under_way": load.tally.num_under_way, "not_sent": not_sent}
        write_text(block(figures, setting) + "\n")
        _say_failures(load, "")
        return Run(setting, figures, records)

    async def _warm_up(self, target: Target, sessions: Sequence[Session], arrivals: Arrivals) -> None:
        clients = Arrivals(concurrency=arrivals.concurrency or min(8, self.num_warm_up))
        load = Load(target, warm_up_of(sessions, self.num_warm_up), clients, vocab_size=self.vocab_size)
        await self._run(load)
        _say_failures(load, "warming up: ")

    async def _run(self, load: Load) -> list[Record]:
        with stopping(load.stop, self.stop):
            async with shown(load.tally, stderr):
                return await load.run()


def _burstiness(arrivals: Arrivals) -> float | str | None:
    if arrivals.rate is None:
        return None
    return "even" if math.isinf(arrivals.burstiness) else arrivals.burstiness  # JSON has no infinity


def _say_failures(load: Load, when: str) -> None:
    """Say on standard error what the first request of each reason was told."""
    for reason, said in load.tally.said.items():
        complain(f"{when}{reason}: {said}")


def _given(context: typer.Context) -> set[str]:
    """Return the options that are on the command line, by their parameters' names."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _shown(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items() if value is not None)


def _check_served(router: options.Router, model: str) -> None:
    """Ask the router once, so that what every request would fail with is said in a line, before the load.

    Raises:
        NotFoundError: UNKNOWN_MODEL; and as `Client.server_info`.
    """
    with router.connect() as client:
        served = client.server_info().model_name
    if model and model != served:
        raise NotFoundError("UNKNOWN_MODEL", f"--model {model}: the router serves {served}")
