"""`headrace up`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from headrace_core.hub import find_model, is_hub_name, machine_bytes, name_of
from headrace_core.identity import ROOTS
from headrace_core.progress import shown
from rich.text import Text

from headrace_client.cluster.cluster_process import ClusterProcess
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_client.cluster.ports import next_free
from headrace_client.commands import certs
from headrace_client.commands.hints import API_KEY_VARIABLE, ASK_FOR_KEY, Reached, reachable
from headrace_client.commands.starting import Starting
from headrace_client.commands.terminal import stdout
from headrace_client.commands.up_checks import check, choose_metrics_port
from headrace_client.commands.up_options import HTTP_PORT, Addresses, Compute, Model, Settings, Workers

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

_LOOK_S = 0.2


def up(
    served: Model,
    workers: Workers,
    addresses: Addresses,
    compute: Compute,
    settings: Settings,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show all that the processes log, not just warnings.")
    ] = False,
) -> None:
    """Run the command. Raises what `find_model` and `LocalCluster.start` list; `app` reports it."""
    name = served.model_name or (served.model if is_hub_name(served.model) else "")
    cluster = _cluster(served, name, workers, addresses, compute, settings)
    check(cluster)
    cluster.model_dir = _find(served, compute.device)
    if cluster.tls and not (cluster.tls / ROOTS).exists():
        certs.make(cluster.tls)
    with _sigterm_as_interrupt():
        _run(cluster, name_of(served.model, name), is_verbose=verbose)


def _cluster(
    served: Model, name: str, workers: Workers, addresses: Addresses, compute: Compute, settings: Settings
) -> LocalCluster:
    named = {"model-name": name} if name else {}
    prefill, decode, both = workers.counts()
    http_listen = addresses.http_listen
    if http_listen is None:
        http_listen = f"127.0.0.1:{free}" if (free := next_free(HTTP_PORT)) else ""
    api_key = os.environ.get(API_KEY_VARIABLE, "")
    cluster = LocalCluster(
        Path(served.model),
        prefill,
        decode,
        num_both=both,
        router_options={
            "listen": addresses.listen,
            **({"http-listen": http_listen} if http_listen else {}),
            **named,
            **settings.of("router"),
        },
        worker_options={
            **{name.replace("_", "-"): value for name, value in asdict(compute).items()},
            "experts": workers.experts,
            "attention-tp": workers.attention_tp,
            **named,
            **settings.of("worker"),
        },
        prefill_options=settings.of("prefill"),
        decode_options=settings.of("decode"),
        metrics_port=choose_metrics_port(addresses.metrics_port, 1 + prefill + decode + both),
        api_key=api_key,
        tls=addresses.tls,
        prefill_ranks=workers.prefill_ranks,
        decode_ranks=workers.decode_ranks,
    )
    cluster.wait_for_workers = not cluster.asks_for_keys or bool(api_key)
    return cluster


def _find(served: Model, device: str) -> Path:
    """Return the model's folder, after a download that shows how far it is. Raises what `find_model` lists."""
    most_bytes = machine_bytes() if device == "cpu" else 0
    with shown(f"downloading {served.model}", stdout.print) as on_progress:
        return find_model(served.model, revision=served.revision, most_bytes=most_bytes, on_progress=on_progress)


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
    identities = None if cluster.has_certificate else cluster.tls
    router = Reached(cluster.router_address, identities, cluster.asks_for_keys, cluster.has_certificate)
    http = cluster.router.http_address
    lines = [
        *([ASK_FOR_KEY] if router.has_keys else []),
        router.headrace("generate", "Once upon a time"),
        router.headrace("chat"),
        router.headrace("status", "--watch"),
        *([router.curl(http)] if http else []),
    ]
    _print(f"\n{name} is served at {reachable(router.address)}. In another terminal:", style="bold")
    for line in lines:
        _print(f"  {line}")
    if router.has_keys:
        _print("The first asks for a client's key, and shows it nowhere.")
    _print(f"Metrics: http://{reachable(cluster.router.metrics_address)}/metrics. Ctrl-C stops everything.\n")


def _print(line: str, style: str = "") -> None:
    stdout.print(Text(line, style=style), soft_wrap=True)


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
