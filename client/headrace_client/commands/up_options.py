"""The options of `headrace up`, by what they are about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from headrace_client.commands.options import parse_settings
from headrace_client.commands.up_checks import METRICS_PORT
from headrace_client.connection import DEFAULT_ADDRESS

HTTP_PORT = 8000
_MOST_WORKERS = 256
"""Of a kind, on one machine."""
_MOST_RANKS = 64


@dataclass(frozen=True)
class Model:
    """What is served."""

    panel: ClassVar = "Model"

    model: Annotated[
        str, typer.Option(help="Folder of a Hugging Face checkpoint, or its name on the hub.", show_default=False)
    ]
    revision: Annotated[
        str, typer.Option(help="Of a name on the hub: branch, tag or commit. Default: its main branch.")
    ] = ""
    model_name: Annotated[
        str, typer.Option(help="What clients call the model. Default: its folder's name, or that on the hub.")
    ] = ""


@dataclass(frozen=True)
class Workers:
    """How many processes, and how those of one worker share it."""

    panel: ClassVar = "Workers"

    prefill: Annotated[
        int | None,
        typer.Option(
            "--prefill", "-p", min=0, max=_MOST_WORKERS, help="Prefill workers. Default: 1, or 0 with --both."
        ),
    ] = None
    decode: Annotated[
        int | None,
        typer.Option("--decode", "-d", min=0, max=_MOST_WORKERS, help="Decode workers. Default: 1, or 0 with --both."),
    ] = None
    both: Annotated[
        int, typer.Option("--both", "-b", min=0, max=_MOST_WORKERS, help="Workers that prefill and decode.")
    ] = 0
    prefill_ranks: Annotated[
        int, typer.Option(min=1, max=_MOST_RANKS, help="Processes that share the model as one prefill worker.")
    ] = 1
    decode_ranks: Annotated[
        int,
        typer.Option(min=1, max=_MOST_RANKS, help="Processes that share the model as one decode or colocated worker."),
    ] = 1
    experts: Annotated[
        str,
        typer.Option(
            help="How ranks share experts. ep: each has whole ones (expert parallelism, EP); tp: a part of every one "
            "(tensor parallelism, TP)."
        ),
    ] = "ep"
    attention_tp: Annotated[
        int,
        typer.Option(
            "--attention-tp",
            min=0,
            max=_MOST_RANKS,
            help="Ranks that share the heads of attention (TP). 0: all; fewer: lanes with sequences of their own (DP).",
        ),
    ] = 0

    def counts(self) -> tuple[int, int, int]:
        """Return how many prefill, decode and colocated workers there are to be."""
        default = 0 if self.both else 1
        prefill = default if self.prefill is None else self.prefill
        return prefill, default if self.decode is None else self.decode, self.both


@dataclass(frozen=True)
class Addresses:
    """Where it serves."""

    panel: ClassVar = "Addresses"

    listen: Annotated[str, typer.Option(help="HOST:PORT for clients.")] = DEFAULT_ADDRESS
    http_listen: Annotated[
        str | None,
        typer.Option(
            help=f"HOST:PORT for OpenAI's clients, over HTTP; empty: none. Default: 127.0.0.1:{HTTP_PORT}, or the next "
            "port that is free.",
            show_default=False,
        ),
    ] = None
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port of the router's Prometheus metrics; the workers' follow; 0: any ports. "
            f"Default: {METRICS_PORT}, or the next that are free.",
            show_default=False,
        ),
    ] = None
    tls: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Encrypt every hop with the certificates in DIR; made there if need be."),
    ] = None


@dataclass(frozen=True)
class Compute:
    """What workers compute with."""

    panel: ClassVar = "Compute"

    device: Annotated[str, typer.Option(help="cpu, or cuda: the first GPU, NVIDIA or AMD.")] = "cpu"
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto"
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (as --dtype), or fp8_e4m3: latents in 8 bits.")] = "auto"
    kernels: Annotated[str, typer.Option(help="auto, reference (plain torch), cpu (compiled), triton or aiter.")] = (
        "auto"
    )
    kv_pool_mib: Annotated[int, typer.Option(min=1, help="Memory of each worker for pages, MiB.")] = 256


@dataclass(frozen=True)
class Settings:
    """Options of the processes themselves."""

    panel: ClassVar = "Options of the processes"

    worker_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For all workers.")] = None
    prefill_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For prefill workers.")] = None
    decode_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For decode workers.")] = None
    router_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For the router.")] = None

    def of(self, kind: str) -> dict[str, str]:
        """Return those of `worker`, `prefill`, `decode` or `router`. Raises as `parse_settings`."""
        return parse_settings(getattr(self, f"{kind}_option"))
