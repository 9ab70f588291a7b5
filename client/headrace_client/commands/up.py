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
from headrace_core.identity import CERT, KEY, ROOTS, Role
from headrace_core.progress import shown
from rich.text import Text

from headrace_client.cluster.cluster_process import ClusterProcess
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_client.commands import certs
from headrace_client.commands.options import parse_settings
from headrace_client.commands.terminal import stdout
from headrace_client.connection import DEFAULT_ADDRESS

HELP = """Start a router and its workers on this machine; Ctrl-C stops them.

Examples:
  headrace up --model demo/model
  headrace up --model deepseek-ai/DeepSeek-V2-Lite     (downloaded from the Hugging Face hub)
  headrace up --model DIR --prefill 2 --decode 2 --kv-pool-mib 1024
  headrace up --model DIR --both 1                (one worker, no hand-off)
  headrace up --model DIR --worker-option max-step-tokens=512
  headrace up --model DIR --tls build/certs       (every hop encrypted, every caller known)
  headrace up --model DIR --http-listen ''       (no HTTP)

The cores are divided among the workers. A worker that dies is reported and not started again; its requests go on \
elsewhere if another worker can take them. If the router dies, everything stops.

Options of the processes:
  python -m headrace_router --help
  python -m headrace_prefill --help
  python -m headrace_decode --help
"""

DEFAULT_HTTP_ADDRESS = "127.0.0.1:8000"

_LOOK_S = 0.2
_STYLES = {"router": "magenta", "prefill": "cyan", "decode": "green", "both": "blue"}
_NAME_WIDTH = 10
_MOST_WORKERS = 256
"""Of a kind, on one machine."""

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
    listen: Annotated[str, typer.Option(help="HOST:PORT for clients.")] = DEFAULT_ADDRESS,
    http_listen: Annotated[
        str, typer.Option(help="HOST:PORT for OpenAI's clients, over HTTP; empty: none.")
    ] = DEFAULT_HTTP_ADDRESS,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the router's Prometheus metrics; 0: any.")
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda: the first GPU, NVIDIA or AMD.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (as --dtype), or fp8_e4m3: latents in 8 bits.")] = "auto",
    kv_pool_mib: Annotated[int, typer.Option(min=1, help="Memory of each worker for pages, MiB.")] = 256,
    tls: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Encrypt every hop with the certificates in DIR; made there if need be."),
    ] = None,
    worker_option: Annotated[_Settings, typer.Option(metavar="NAME=VALUE", help="For all workers.")] = None,
    prefill_option: Annotated[_Settings, typer.Option(metavar="NAME=VALUE", help="For prefill workers.")] = None,
    decode_option: Annotated[_Settings, typer.Option(metavar="NAME=VALUE", help="For decode workers.")] = None,
    router_option: Annotated[_Settings, typer.Option(metavar="NAME=VALUE", help="For the router.")] = None,
) -> None:
    """Run the command. Raises what `find_model` and `LocalCluster.start` list; `app` reports it."""
    name = model_name or (model if is_hub_name(model) else "")
    named = {"model-name": name} if name else {}
    folder = _find(model, revision, device)
    if tls and not (tls / ROOTS).exists():
        certs.make(tls)
    cluster = LocalCluster(
        folder,
        (0 if both else 1) if prefill is None else prefill,
        (0 if both else 1) if decode is None else decode,
        num_both=both,
        router_options={
            "listen": listen,
            **({"http-listen": http_listen} if http_listen else {}),
            "metrics-listen": f"127.0.0.1:{metrics_port}",
            **named,
            **parse_settings(router_option),
        },
        worker_options={
            "device": device,
            "dtype": dtype,
            "kv-cache-dtype": kv_cache_dtype,
            "kv-pool-mib": kv_pool_mib,
            **named,
            **parse_settings(worker_option),
        },
        prefill_options=parse_settings(prefill_option),
        decode_options=parse_settings(decode_option),
        log_sink=_print_line,
        on_ready=_say_ready,
        tls=tls,
    )
    with _sigterm_as_interrupt():
        _run(cluster)


def _find(model: str, revision: str, device: str) -> Path:
    """Return the model's folder, after a download that shows how far it is. Raises what `find_model` lists."""
    most_bytes = machine_bytes() if device == "cpu" else 0
    with shown(f"downloading {model}", stdout.print) as on_progress:
        return find_model(model, revision=revision, most_bytes=most_bytes, on_progress=on_progress)


def _run(cluster: LocalCluster) -> None:
    """Start, watch until Ctrl-C or the router's end, stop; a Ctrl-C while stopping kills."""
    has_started = False
    try:
        cluster.start()
        has_started = True
        _explain(cluster)
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


def _explain(cluster: LocalCluster) -> None:
    address = cluster.router_address
    server = "" if address == DEFAULT_ADDRESS else f" --server {address}"
    if cluster.tls:
        server += f" --identity {cluster.tls / Role.CLIENT.value}"
    lines = [
        Text(f"\n{cluster.model_dir} is served at {address}. In another terminal:", style="bold"),
        Text(f'  headrace generate{server} "Once upon a time"'),
        Text(f"  headrace chat{server}"),
        Text(f"  headrace status{server} --watch"),
        *([Text(f"  {curl_line(cluster.router.http_address, cluster.tls)}")] if cluster.router.http_address else []),
        Text(f"Metrics: http://{cluster.router.metrics_address}/metrics. Ctrl-C stops everything.\n"),
    ]
    for line in lines:
        stdout.print(line, soft_wrap=True)


def curl_line(address: str, tls: Path | None = None) -> str:
    """Return a command that asks a router over HTTP, to be pasted; `tls` is a folder of identities."""
    url = f"http://{address}"
    if tls:
        folder = tls / Role.CLIENT.value
        name = f"{Role.ROUTER.server_name}:{address.rpartition(':')[2]}"
        url = f"--cacert {folder / ROOTS} --cert {folder / CERT} --key {folder / KEY} "
        url += f"--connect-to {name}:{address} https://{name}"
    body = '{"prompt": "Once upon a time", "max_tokens": 40, "stream": true}'
    return f"curl -N {url}/v1/completions -H 'content-type: application/json' -d '{body}'"


def _say_ready(process: ClusterProcess) -> None:
    where = f"{process.address}, metrics at {process.metrics_address}"
    stdout.print(Text(f"{process.name} is ready at {where} (pid {process.pid})", style="bold"), soft_wrap=True)


def _print_line(name: str, line: str) -> None:
    style = _STYLES[name.partition("-")[0]]
    try:
        stdout.print(Text.assemble((f"{name:>{_NAME_WIDTH}} | ", style), line), soft_wrap=True)
    except (SystemExit, OSError):
        # Nobody reads any more (rich exits then): end as a pipeline's commands do, but in order.
        os.kill(os.getpid(), signal.SIGTERM)


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
