"""`headrace demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from headrace_core.address import parse_address
from headrace_core.errors import InvalidRequestError
from headrace_core.packages import check_worker_packages
from rich.text import Text

from headrace_client.client import Client
from headrace_client.cluster.cluster_process import ClusterProcess
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_client.cluster.ports import next_free
from headrace_client.codec import Collector
from headrace_client.commands.hints import Reached, headrace
from headrace_client.commands.terminal import stdout, write_text
from headrace_client.commands.up_options import HTTP_PORT
from headrace_client.commands.waterfall import waterfall
from headrace_client.connection import DEFAULT_ADDRESS
from headrace_client.results import Generation
from headrace_client.sampling import SamplingParams

HELP = """Start a small cluster, stream a story, show where its time went, stop.

Examples:
  headrace demo
  headrace demo --prompt "Once upon a time there was a brave owl."

A prefill worker computes the prompt, hands its pages over gRPC to a decode worker, which writes the story: the \
same processes as in a real deployment, with a model small enough for any CPU.
"""

_PROMPT = "Once upon a time there was a little fox named Zorvim."
_SAMPLING = SamplingParams(max_tokens=220, temperature=0.0)
_KV_POOL_MIB = 64


def demo(
    model: Annotated[Path | None, typer.Option(help="Folder of a checkpoint. Default: the demo model.")] = None,
    prompt: Annotated[str, typer.Option(help="What the story begins with.")] = _PROMPT,
) -> None:
    """Run the command. Raises what `LocalCluster.start` and `Client.generate` list; `app` reports it."""
    check_worker_packages()
    folder = model or find_demo_model()
    started_s = time.monotonic()

    def say_ready(process: ClusterProcess) -> None:
        elapsed_s = time.monotonic() - started_s
        stdout.print(Text(f"  {process.name:<10} ready at {process.address} after {elapsed_s:.1f} s", style="dim"))

    stdout.print(Text(f"Starting a prefill worker, a decode worker and a router with {folder}", style="bold"))
    port = next_free(HTTP_PORT)
    cluster = LocalCluster(
        folder,
        router_options={"http-listen": f"127.0.0.1:{port}"} if port else {},
        worker_options={"kv-pool-mib": _KV_POOL_MIB},
        on_ready=say_ready,
    )
    with cluster:
        stdout.print(Text(_about_http(port), style="dim"), soft_wrap=True)
        stdout.print()
        with Client(cluster.router_address) as client:
            result = _stream(client, prompt)
        _show(result)
    stdout.print(Text(f"\nEverything is stopped again; {time.monotonic() - started_s:.1f} s in all.", style="dim"))
    _suggest(folder)


def _about_http(port: int) -> str:
    if not port:
        return f"  no HTTP: port {HTTP_PORT} and those after it are taken"
    taken = "" if port == HTTP_PORT else f" ({HTTP_PORT} is taken)"
    return f"  OpenAI's API while it runs: http://127.0.0.1:{port}/v1{taken}"


def find_demo_model() -> Path:
    """Return the demo model's folder: in the repository this file belongs to, in the wheel, or the working folder.

    Raises:
        InvalidRequestError: NO_MODEL, none of them has it.
    """
    here = Path(__file__).resolve()
    candidates = [here.parents[3] / "demo" / "model", here.parents[1] / "demo_model", Path("demo") / "model"]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    raise InvalidRequestError(
        "NO_MODEL", f"no demo model at {candidates[0]}: run this in the repository, or name a checkpoint with --model"
    )


def _stream(client: Client, prompt: str) -> Generation:
    collector = Collector()
    stdout.print(Text(prompt, style="bold"), end="", soft_wrap=True)
    with client.stream(prompt, _SAMPLING, include_timings=True) as stream:
        for delta in stream:
            collector.add(delta)
            write_text(delta.text)
    write_text("\n")
    return collector.generation()


def _show(result: Generation) -> None:
    stdout.print()
    if result.timings:
        stdout.print(waterfall(result.timings, result.usage))


def _suggest(folder: Path) -> None:
    """Print what to do next, with the ports that are free then."""
    here = Path.cwd()
    folder = folder.relative_to(here) if folder.is_relative_to(here) else folder
    default = parse_address(DEFAULT_ADDRESS)
    router = Reached(f"{default.host}:{next_free(default.port) or default.port}")
    http_port = next_free(HTTP_PORT) or HTTP_PORT
    listen = [] if router.address == DEFAULT_ADDRESS else ["--listen", router.address]
    http_listen = [] if http_port == HTTP_PORT else ["--http-listen", f"127.0.0.1:{http_port}"]
    for line in (
        "\nNext:",
        f"  {headrace('up', '--model', folder, '--prefill', '1', '--decode', '2', *listen, *http_listen)}",
        "and in another terminal, where a killed worker does not end a story:",
        f"  {router.headrace('generate', 'Once upon a time', '--timings')}",
        f"  {router.headrace('status', '--watch')}",
        f"  {router.curl(f'127.0.0.1:{http_port}')}",
    ):
        stdout.print(Text(line, style="" if line.startswith("  ") else "bold"), soft_wrap=True)
