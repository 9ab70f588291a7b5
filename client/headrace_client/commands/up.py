"""`headrace up`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from headrace_core.hub import find_model, is_hub_name, machine_bytes
from headrace_core.identity import ROOTS
from headrace_core.progress import shown
from rich.text import Text

from headrace_client.cluster.cluster_process import ClusterProcess
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_client.cluster.ports import next_free
from headrace_client.commands import certs
from headrace_client.commands.hints import ASK_FOR_KEY, client_options, curl_line
from headrace_client.commands.options import API_KEY_VARIABLE, parse_settings
from headrace_client.commands.starting import Starting
from headrace_client.commands.terminal import stdout
from headrace_client.commands.up_checks import METRICS_PORT, check, choose_metrics_port
from headrace_client.connection import DEFAULT_ADDRESS

HELP = """Start a router and its workers on this machine; Ctrl-C stops them.

Examples:
  headrace up --model demo/model
  headrace up --model deepseek-ai/DeepSeek-V2-Lite     (downloaded from the Hugging Face hub)
  headrace up --model DIR --prefill 2 --decode 2 --kv-pool-mib 1024
  headrace up --model DIR --both 1                (one worker, no hand-off)
  headrace up --model DIR --decode-ranks 2        (the decode worker is two processes, each with half of the experts)
  headrace up --model DIR --worker-option max-step-tokens=512
  headrace up --model DIR --tls build/certs       (every hop encrypted, every caller known)
  headrace up --model DIR --http-listen ''        (no HTTP)

The cores are divided among the workers' processes. A worker that dies is reported and not started again; its requests \
go on elsewhere if another worker can take them. If a rank dies, so does its worker; if the router, everything stops.

Options of the processes:
  python -m headrace_router --help
  python -m headrace_prefill --help
  python -m headrace_decode --help
"""

HTTP_PORT = 8000
_LOOK_S = 0.2
_MOST_WORKERS = 256
"""Of a kind, on one machine."""

_MOST_RANKS = 64

_Settings = list[str] | None


def up(  # the signature is the command line
    model: Annotated[
        str, typer.Option(help="Folder of a Hugging Face checkpoint, or its name on the hub.", show_default=False)
    ],
    revision: Annotated[
        str, typer.Option(help="Of a name on the hub: branch, tag or commit. Default: its main branch.")
    ] = "",
    model_name: Annotated[
        str, typer.Option(help="What clients call the model. Default: its folder's name, or that on the hub.")
    ] = "",
    prefill: Annotated[
        int | None,
        typer.Option(
            "--prefill", "-p", min=0, max=_MOST_WORKERS, help="Prefill workers. Default: 1, or 0 with --both."
        ),
    ] = None,
    decode: Annotated[
        int | None,
        typer.Option("--decode", "-d", min=0, max=_MOST_WORKERS, help="Decode workers. Default: 1, or 0 with --both."),
    ] = None,
    both: Annotated[
        int, typer.Option("--both", "-b", min=0, max=_MOST_WORKERS, help="Workers that prefill and decode.")
    ] = 0,
    prefill_ranks: Annotated[
        int, typer.Option(min=1, max=_MOST_RANKS, help="Processes that share the model as one prefill worker.")
    ] = 1,
    decode_ranks: Annotated[
        int,
        typer.Option(min=1, max=_MOST_RANKS, help="Processes that share the model as one decode or colocated worker."),
    ] = 1,
    experts: Annotated[
        str,
        typer.Option(
            help="How ranks share experts. ep: each has whole ones (expert parallelism, EP); tp: a part of every one "
            "(tensor parallelism, TP)."
        ),
    ] = "ep",
    attention_tp: Annotated[
        int,
        typer.Option(
            "--attention-tp",
            min=0,
            max=_MOST_RANKS,
            help="Ranks that share the heads of attention (TP). 0: all; fewer: lanes with sequences of their own (DP).",
        ),
    ] = 0,
    listen: Annotated[str, typer.Option(help="HOST:PORT for clients.")] = DEFAULT_ADDRESS,
    http_listen: Annotated[
        str | None,
        typer.Option(
            help=f"HOST:PORT for OpenAI's clients, over HTTP; empty: none. Default: 127.0.0.1:{HTTP_PORT}, or the next "
            "port that is free.",
            show_default=False,
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port of the router's Prometheus metrics; the workers' follow; 0: any ports. "
            f"Default: {METRICS_PORT}, or the next that are free.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: the first GPU, NVIDIA or AMD.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (as --dtype), or fp8_e4m3: latents in 8 bits.")] = "auto",
    kernels: Annotated[
        str, typer.Option(help="auto, reference (plain torch), cpu (compiled), triton or aiter.")
    ] = "auto",
    kv_pool_mib: Annotated[int, typer.Option(min=1, help="Memory of each worker for pages, MiB.")] = 256,
    tls: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Encrypt every hop with the certificates in DIR; made there if need be."),
    ] = None,
    worker_option: Annotated[_Settings, typer.Option(metavar="NAME=VALUE", help="For all workers.")] = None,
    prefill_option: Annotated[_Settings, typer.Option(metavar="NAME=VALUE", help="For prefill workers.")] = None,
    decode_option: Annotated[_Settings, typer.Option(metavar="NAME=VALUE", help="For decode workers.")] = None,
    router_option: Annotated[_Settings, typer.Option(metavar="NAME=VALUE", help="For the router.")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show all that the processes log, not just warnings.")
    ] = False,
) -> None:
    """Run the command. Raises what `find_model` and `LocalCluster.start` list; `app` reports it."""
    name = model_name or (model if is_hub_name(model) else "")
    named = {"model-name": name} if name else {}
    prefill = (0 if both else 1) if prefill is None else prefill
    decode = (0 if both else 1) if decode is None else decode
    if http_listen is None:
        http_listen = f"127.0.0.1:{free}" if (free := next_free(HTTP_PORT)) else ""
    api_key = os.environ.get(API_KEY_VARIABLE, "")
    cluster = LocalCluster(
        Path(model),
        prefill,
        decode,
        num_both=both,
        router_options={
            "listen": listen,
            **({"http-listen": http_listen} if http_listen else {}),
            **named,
            **parse_settings(router_option),
        },
        worker_options={
            "device": device,
            "dtype": dtype,
            "kv-cache-dtype": kv_cache_dtype,
            "kernels": kernels,
            "kv-pool-mib": kv_pool_mib,
            "experts": experts,
            "attention-tp": attention_tp,
            **named,
            **parse_settings(worker_option),
        },
        prefill_options=parse_settings(prefill_option),
        decode_options=parse_settings(decode_option),
        metrics_port=choose_metrics_port(metrics_port, 1 + prefill + decode + both),
        api_key=api_key,
        tls=tls,
        prefill_ranks=prefill_ranks,
        decode_ranks=decode_ranks,
    )
    cluster.wait_for_workers = not cluster.asks_for_keys or bool(api_key)
    check(cluster)
    cluster.model_dir = _find(model, revision, device)
    if tls and not (tls / ROOTS).exists():
        certs.make(tls)
    with _sigterm_as_interrupt():
        _run(cluster, name or model, is_verbose=verbose)


def _find(model: str, revision: str, device: str) -> Path:
    """Return the model's folder, after a download that shows how far it is. Raises what `find_model` lists."""
    most_bytes = machine_bytes() if device == "cpu" else 0
    with shown(f"downloading {model}", stdout.print) as on_progress:
        return find_model(model, revision=revision, most_bytes=most_bytes, on_progress=on_progress)


def _run(cluster: LocalCluster, name: str, *, is_verbose: bool) -> None:
    """Start, watch until Ctrl-C or the router's end, stop; a Ctrl-C while stopping kills."""
    starting = Starting(cluster.first_names(), is_verbose=is_verbose)
    cluster.log_sink, cluster.on_ready = starting.on_line, starting.on_ready
    has_started = False
    try:
        with starting:
            cluster.start()
        has_started = True
        _explain(cluster, name)
        _watch(cluster)
        raise typer.Exit(1)
    except KeyboardInterrupt:
        # Once it serves, Ctrl-C is how it is meant to end.
        if not has_started:
            raise
    finally:
        _stop(cluster)


def _watch(cluster: LocalCluster) -> None:
    """Report each process that ends; return when the router has."""
    reported: set[str] = set()
    while "router" not in reported:
        time.sleep(_LOOK_S)
        for process in cluster.processes:
            if process.name not in reported and process.poll() is not None:
                reported.add(process.name)
                stdout.print(Text(f"{process.name} ended unasked: {_ending(process)}", style="bold red"))


def _stop(cluster: LocalCluster) -> None:
    if any(process.poll() is None for process in cluster.processes):
        stdout.print("stopping; Ctrl-C again kills", style="dim")
    try:
        cluster.stop()
    except KeyboardInterrupt:
        cluster.kill()


def _explain(cluster: LocalCluster, name: str) -> None:
    address, http = cluster.router_address, cluster.router.http_address
    options = client_options(address, cluster.tls)
    lines = [
        Text(f"\n{name} is served at {address}. In another terminal:", style="bold"),
        *([Text(f"  {ASK_FOR_KEY}     (then paste a client's key)")] if cluster.asks_for_keys else []),
        Text(f'  headrace generate{options} "Once upon a time"'),
        Text(f"  headrace chat{options}"),
        Text(f"  headrace status{options} --watch"),
        *([Text(f"  {curl_line(http, cluster.tls, has_keys=cluster.asks_for_keys)}")] if http else []),
        Text(f"Metrics: http://{cluster.router.metrics_address}/metrics. Ctrl-C stops everything.\n"),
    ]
    for line in lines:
        stdout.print(line, soft_wrap=True)


def _ending(process: ClusterProcess) -> str:
    code = process.poll() or 0
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


@contextmanager
def _sigterm_as_interrupt() -> Generator[None, Any, None]:
    """Let SIGTERM end the command as Ctrl-C does, so that its children drain."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
