"""The options of `headrace bench`, by what they are about, and what they turn into."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from headrace_client.bench.asked import Dataset, levels_of
from headrace_client.bench.goodput import Goodput, parse_goodput
from headrace_client.bench.http_target import HttpOptions
from headrace_client.bench.load import Arrivals
from headrace_client.bench.prompts import FIRST_TOKEN
from headrace_client.commands.options import finite

_MOST_TOKENS = 10_000_000
"""Of a prompt or an answer: more is a slip of the hand, and would fill this machine's memory."""
_MOST_REQUESTS = 1_000_000


def _a_number(value: float) -> float:
    if math.isnan(value):
        raise typer.BadParameter(f"{value} is no number of its range")
    return value


@dataclass(frozen=True)
class Asked:
    """Which prompts, and answers how long."""

    panel: ClassVar = "What is asked"

    dataset: Annotated[
        str,
        typer.Option(
            help="random 1024/128, conversation 256/256, conversation-large-batch (4,096 of these), reasoning 256/4096,"
            " summarization 4096/256, shared-prefix, multi-turn; tokens in/out.",
        ),
    ] = "random"
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A recorded trace instead: Mooncake's JSON lines, or Azure's CSV.",
            show_default=False,
        ),
    ] = None
    num_requests: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST_REQUESTS, help="Default: 100, or as the name says.", show_default=False),
    ] = None
    input_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MOST_TOKENS, help="Of each prompt, or turn. Default: as the name says.", show_default=False
        ),
    ] = None
    output_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST_TOKENS, help="Of each answer. Default: as the name says.", show_default=False),
    ] = None
    range_ratio: Annotated[
        float, typer.Option(min=0.0, max=1.0, callback=finite, help="Spread of both around these, 0 to 1.")
    ] = 0.0
    prefixes: Annotated[int, typer.Option(min=1, help="Of shared-prefix: how many.")] = 8
    prefix_tokens: Annotated[
        int, typer.Option(min=1, max=_MOST_TOKENS, help="Of shared-prefix: the length of each.")
    ] = 512
    turns: Annotated[int, typer.Option(min=1, help="Of multi-turn: in a conversation.")] = 4
    length_scale: Annotated[
        float, typer.Option(min=1e-3, callback=finite, help="Prompts and answers so many times shorter.")
    ] = 1.0
    time_scale: Annotated[float, typer.Option(min=1e-6, callback=finite, help="Of a trace: so many times as fast.")] = (
        1.0
    )
    vocab_size: Annotated[
        int,
        typer.Option(
            min=FIRST_TOKEN + 1, max=2**31 - 1, help="Prompts are of token ids below this; every model has these."
        ),
    ] = 256
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Another one asks other things.")] = 0

    def of_dataset(self) -> Dataset:
        """Return what to ask."""
        return Dataset(
            self.dataset,
            trace=self.trace,
            num_requests=self.num_requests,
            num_input=self.input_tokens,
            num_output=self.output_tokens,
            spread=self.range_ratio,
            num_prefixes=self.prefixes,
            num_prefix_tokens=self.prefix_tokens,
            num_turns=self.turns,
            time_scale=self.time_scale,
            length_scale=self.length_scale,
            seed=self.seed,
        )


@dataclass(frozen=True)
class When:
    """How requests come."""

    panel: ClassVar = "Load"

    request_rate: Annotated[
        str | None,
        typer.Option(metavar="R[,R…]", help="Sessions a second, or inf; several: a run each.", show_default=False),
    ] = None
    concurrency: Annotated[
        str | None,
        typer.Option(metavar="N[,N…]", help="Most requests under way; several: a run each.", show_default=False),
    ] = None
    burstiness: Annotated[
        float, typer.Option(min=1e-3, callback=_a_number, help="Of arrivals: 1 Poisson, less is burstier, inf even.")
    ] = 1.0
    warm_up: Annotated[
        int, typer.Option(min=0, max=_MOST_REQUESTS, help="Requests before each run that are not counted.")
    ] = 0

    def levels(self, seed: int) -> list[Arrivals]:
        """Return the levels of load, one run each. Raises as `levels_of`."""
        return levels_of(self.request_rate, self.concurrency, burstiness=self.burstiness, seed=seed)


@dataclass(frozen=True)
class Output:
    """What is made of the answers."""

    panel: ClassVar = "Output"

    goodput: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:MS,…",
            help="Count requests that keep ttft, tpot, itl (their p99), e2el.",
            show_default=False,
        ),
    ] = None
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write figures, and every request's times.")
    ] = None
    as_html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")] = None

    def limits(self) -> Goodput | None:
        """Return what a good request keeps. Raises as `parse_goodput`."""
        return parse_goodput(self.goodput) if self.goodput else None


@dataclass(frozen=True)
class Server:
    """Who is asked, besides where it is."""

    panel: ClassVar = "Server"

    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask OpenAI's API here, over HTTP.", show_default=False)
    ] = None
    chat: Annotated[bool, typer.Option("--chat", help="With --base-url: conversations, of words.")] = False
    continuous_usage: Annotated[bool, typer.Option(help="With --base-url: ask for counts in every event.")] = True
    model: Annotated[str, typer.Option(help="Model name; default: the one served.", show_default=False)] = ""
    timeout: Annotated[float, typer.Option(min=0.001, callback=finite, help="Seconds a request may take.")] = 600.0

    def over_http(self, api_key: str, tls_roots: Path | None, *, wants_ids: bool) -> HttpOptions:
        """Return how OpenAI's API is asked."""
        roots = None if tls_roots is None else str(tls_roots)
        return HttpOptions(self.model, self.chat, self.continuous_usage, wants_ids, api_key, roots, self.timeout)
