"""`headrace bench` and `headrace bench compare`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from headrace_core.errors import InvalidRequestError
from headrace_core.process import raise_file_limit

from headrace_client.bench import compare as comparing
from headrace_client.bench.asked import Dataset, levels_of, warm_up_of
from headrace_client.bench.block import block
from headrace_client.bench.effects import check_effects
from headrace_client.bench.figures import figures_of
from headrace_client.bench.goodput import Goodput, parse_goodput
from headrace_client.bench.grpc_target import GrpcTarget
from headrace_client.bench.http_target import HttpOptions, HttpTarget
from headrace_client.bench.load import Arrivals, Load
from headrace_client.bench.page import page
from headrace_client.bench.progress import shown
from headrace_client.bench.prompts import FIRST_TOKEN, Session
from headrace_client.bench.record import Record
from headrace_client.bench.report import Run, encode_report, read_report
from headrace_client.bench.stopping import Stop, stopping
from headrace_client.bench.target import Target
from headrace_client.commands import options
from headrace_client.commands.terminal import complain, stderr, write_text
from headrace_client.connection import DEFAULT_ADDRESS

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

app = typer.Typer(invoke_without_command=True, rich_markup_mode="rich", add_completion=False)
_ASKED = "What is asked"
_LOAD = "Load"
_OUTPUT = "Output"
_MOST_TOKENS = 10_000_000
"""Of a prompt or an answer: more is a slip of the hand, and would fill this machine's memory."""
_MOST_REQUESTS = 1_000_000


def _a_number(value: float) -> float:
    if math.isnan(value):
        raise typer.BadParameter(f"{value} is no number of its range")
    return value


def _asked(name: str, **more: Any) -> Any:
    return typer.Option(name, rich_help_panel=_ASKED, show_default=False, **more)


@app.callback(help=HELP)
def bench(  # the signature is the command line
    context: typer.Context,
    dataset: Annotated[
        str,
        typer.Option(
            help="random 1024/128, conversation 256/256, conversation-large-batch (4,096 of these), reasoning 256/4096,"
            " summarization 4096/256, shared-prefix, multi-turn; tokens in/out.",
            rich_help_panel=_ASKED,
        ),
    ] = "random",
    trace: Annotated[
        Path | None, _asked("--trace", help="A recorded trace instead: Mooncake's JSON lines, or Azure's CSV.")
    ] = None,
    num_requests: Annotated[
        int | None, _asked("--num-requests", min=1, max=_MOST_REQUESTS, help="Default: 100, or as the name says.")
    ] = None,
    input_tokens: Annotated[
        int | None, _asked("--input-tokens", min=1, max=_MOST_TOKENS, help="Of each prompt, or turn.")
    ] = None,
    output_tokens: Annotated[
        int | None, _asked("--output-tokens", min=1, max=_MOST_TOKENS, help="Of each answer.")
    ] = None,
    range_ratio: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            callback=options.finite,
            help="Spread of both around these, 0 to 1.",
            rich_help_panel=_ASKED,
        ),
    ] = 0.0,
    prefixes: Annotated[int, typer.Option(min=1, help="Of shared-prefix: how many.", rich_help_panel=_ASKED)] = 8,
    prefix_tokens: Annotated[
        int,
        typer.Option(min=1, max=_MOST_TOKENS, help="Of shared-prefix: the length of each.", rich_help_panel=_ASKED),
    ] = 512,
    turns: Annotated[int, typer.Option(min=1, help="Of multi-turn: in a conversation.", rich_help_panel=_ASKED)] = 4,
    length_scale: Annotated[
        float,
        typer.Option(
            min=1e-3, callback=options.finite, help="Prompts and answers so many times shorter.", rich_help_panel=_ASKED
        ),
    ] = 1.0,
    time_scale: Annotated[
        float,
        typer.Option(
            min=1e-6, callback=options.finite, help="Of a trace: so many times as fast.", rich_help_panel=_ASKED
        ),
    ] = 1.0,
    vocab_size: Annotated[
        int,
        typer.Option(
            min=FIRST_TOKEN + 1,
            max=2**31 - 1,
            help="Prompts are of token ids below this; every model has these.",
            rich_help_panel=_ASKED,
        ),
    ] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Another one asks other things.")] = 0,
    request_rate: Annotated[
        str | None,
        typer.Option(
            metavar="R[,R…]",
            help="Sessions a second, or inf; several: a run each.",
            rich_help_panel=_LOAD,
            show_default=False,
        ),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(
            min=1e-3,
            callback=_a_number,
            help="Of arrivals: 1 Poisson, less is burstier, inf even.",
            rich_help_panel=_LOAD,
        ),
    ] = 1.0,
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N…]",
            help="Most requests under way; several: a run each.",
            rich_help_panel=_LOAD,
            show_default=False,
        ),
    ] = None,
    warm_up: Annotated[
        int,
        typer.Option(
            min=0, max=_MOST_REQUESTS, help="Requests before each run that are not counted.", rich_help_panel=_LOAD
        ),
    ] = 0,
    goodput: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:MS,…",
            help="Count requests that keep ttft, tpot, itl (their p99), e2el.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write figures and every request.", rich_help_panel=_OUTPUT),
    ] = None,
    as_html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.", rich_help_panel=_OUTPUT)
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask OpenAI's API here, over HTTP.", show_default=False)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="With --base-url: conversations, of words.")] = False,
    continuous_usage: Annotated[bool, typer.Option(help="With --base-url: ask for counts in every event.")] = True,
    model: Annotated[str, typer.Option(help="Model name; default: the one served.", show_default=False)] = "",
    timeout: Annotated[
        float, typer.Option(min=0.001, callback=options.finite, help="Seconds a request may take.")
    ] = 600.0,
    server: options.Server = DEFAULT_ADDRESS,
    api_key_file: options.ApiKeyFile = None,
    tls: options.Tls = False,
    tls_roots: options.TlsRoots = None,
    identity: options.Identity = None,
) -> None:
    """Run the command. Raises what is wrong with its options; what a server refuses is a request that failed."""
    if context.invoked_subcommand is not None:
        return
    check_effects(
        _given(context), dataset=dataset, has_trace=trace is not None, has_rate=request_rate is not None,
        is_http=base_url is not None,
    )  # fmt: skip
    for path in (as_json, as_html):
        _check_writable(path)
    asked = Dataset(
        dataset, trace, num_requests, input_tokens, output_tokens, range_ratio, prefixes, prefix_tokens, turns,
        time_scale, length_scale, seed,
    )  # fmt: skip
    levels = levels_of(request_rate, concurrency, burstiness=burstiness, seed=seed)
    limits = parse_goodput(goodput) if goodput else None
    with options.connect(server, api_key_file, tls=tls, tls_roots=tls_roots, identity=identity) as client:
        connection = client.options
    wants_ids = trace is None and dataset == "multi-turn"
    http = HttpOptions(model, chat, continuous_usage, wants_ids, connection.api_key, _text(tls_roots), timeout)

    async def target() -> Target:
        if base_url is None:
            return GrpcTarget(server, connection, model=model, timeout_s=timeout)
        over_http = HttpTarget(base_url, http)
        await over_http.start()
        return over_http

    raise_file_limit()  # a connection is a file
    bench_of = _Bench(asked, levels, limits, warm_up, vocab_size)
    runs = uvloop.run(bench_of.run(target))
    command = shlex.join(["headrace", *sys.argv[1:]])
    if as_json is not None:
        _write(as_json, json.dumps(encode_report(runs, command=command, target=base_url or server)) + "\n")
    if as_html is not None:
        _write(as_html, page(runs, title=f"headrace bench: {base_url or server}", command=command))
    if bench_of.stop.by is not None:
        raise typer.Exit(128 + bench_of.stop.by)
    if not any(run.figures["completed"] for run in runs):
        raise typer.Exit(1)


@app.command(help="Say whether the runs of two reports differ, with 95 % intervals (bootstrap over requests).")
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


def _check_writable(path: Path | None) -> None:
    """See before a long run that its report can be written after it. Raises InvalidRequestError, BAD_OPTION."""
    if path is None:
        return
    if path.is_dir():
        raise InvalidRequestError("BAD_OPTION", f"can't write {path}: it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidRequestError("BAD_OPTION", f"can't write {path}: no such folder, or no right to")


def _shown(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items() if value is not None)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError("BAD_OPTION", f"can't write {path}: {error.strerror}") from None
