"""Builds the images, starts the stack of deploy/compose.yaml on a real engine, and looks whether it does what it says.

    make test-compose
    make test-compose ARGS="--without deploy/compose.own-images.yaml"
    make test-compose ARGS="--only-identities"

Needs a Docker engine (DOCKER_HOST, as always) whose published ports can be reached. Streams requests whose every token
is checked, holds the bytes that moved against the pages, asks every panel's query at rest and under load, adds decode
containers, kills one, drains one, takes it all down; then all of it again with certificates and keys (`identities.py`).
Writes build/compose/facts.json; exits with 1 on any problem.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from headrace_client import AsyncClient, ConnectionOptions
from rich.console import Console

from tests.compose import identities, images, load, panels
from tests.compose.stack import BASE, HERE, ROOT, SERVICES, Stack, wait_until
from tests.load.clients import references, requests, run_clients
from tests.perf.machine import machine

FACTS = ROOT / "build" / "compose" / "facts.json"
ROUTER = f"{HERE}:50050"
PROMETHEUS = f"{HERE}:9090"
PAGE_SIZE = 64
NUM_CLIENTS = 6
NUM_HAND_OFFS = 24
MOST_DOWN_S = 15.0
LOAD_S = 20.0
RECEIVED = 'headrace_transfer_bytes_total{role="decode",direction="received"}'
SENT = 'headrace_transfer_bytes_total{role="prefill",direction="sent"}'
UNSEEN = {
    "Held now: quarantined pages": "over gRPC a failed transfer is drained at once: nothing is in quarantine for long",
}
"""Queries that this run need not change, and why."""


def bytes_of_a_page() -> int:
    """Return a page's bytes over all layers in float32, from the model's own file alone."""
    config = json.loads((ROOT / "demo" / "model" / "config.json").read_text())
    return PAGE_SIZE * config["num_hidden_layers"] * (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * 4


class Run:
    """One run: `facts` is what was seen, by what it is about."""

    def __init__(self, stack: Stack, console: Console) -> None:
        self.stack = stack
        self.facts: dict[str, Any] = {"machine": machine()}
        self._console = console

    def note(self, name: str, fact: Any) -> None:
        """Keep and print a fact."""
        self.facts[name] = fact
        self.say(f"{name}: {fact}")

    def say(self, line: str) -> None:
        """Print a line as it is."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def start(self) -> None:
        """Start the stack; return when every process of ours is healthy, and Prometheus has all of them."""
        began_s = time.monotonic()
        self.stack.up()
        for service, count in zip(SERVICES, (1, 2, 2), strict=True):
            self.stack.wait_healthy(service, count)
        self.note("seconds until all five are healthy", round(time.monotonic() - began_s, 1))
        wait_until(lambda: self.scraped() == 5, "Prometheus scrapes five processes")
        for service in SERVICES:
            hold_to_no_rights(self.stack.containers(service)[0])

    def scraped(self) -> float:
        """Return how many processes of ours Prometheus reaches."""
        try:
            return panels.total(PROMETHEUS, 'up{job="headrace"}')
        except OSError:
            return 0

    async def measure_bytes(self, client: AsyncClient) -> None:
        """Compare what the metrics say was moved with pages × page bytes of what was sent."""
        before = [panels.total(PROMETHEUS, f"sum({name})") for name in (RECEIVED, SENT)]
        timings = await load.hand_offs(client, NUM_HAND_OFFS)
        num_pages = sum(each.num_transfer_pages for each in timings)
        wanted = num_pages * bytes_of_a_page()

        def moved() -> list[float]:
            now = [panels.total(PROMETHEUS, f"sum({name})") for name in (RECEIVED, SENT)]
            return [after - start for after, start in zip(now, before, strict=True)]

        await asyncio.to_thread(wait_until, lambda: moved() == [wanted, wanted], f"{wanted} bytes by the metrics")
        assert num_pages, "nothing was handed off"
        self.note("pages handed off", num_pages)
        self.note("bytes of a page", bytes_of_a_page())
        self.note("bytes received and sent by the metrics, each pages × bytes of a page", moved())
        self.note("transport", sorted({each.transport for each in timings}))

    async def kill(self, victim: Any) -> None:
        """Kill a worker's container."""
        container = await asyncio.to_thread(self.stack.container_at, victim.role, victim.address)
        await asyncio.to_thread(container.kill)
        num_there = victim.num_running + victim.num_waiting
        self.note(f"sequences at the {victim.role} container when it was killed", num_there)

    async def disturb(self, client: AsyncClient) -> None:
        """Kill a prefill container, add two decode ones, kill one, drain one: all at work, beside the clients' load."""
        prompts = asyncio.create_task(load.long_prompts(client))
        await self.kill(await busiest(client, "prefill", least=2))  # of which one is computed when it is killed
        await prompts
        await asyncio.to_thread(self.stack.up, "prefill")
        began_s = time.monotonic()
        await asyncio.to_thread(self.stack.up, "--scale", "decode=4", "decode")
        await ready(client, 4)
        self.note("seconds from --scale decode=4 until the router has four", round(time.monotonic() - began_s, 1))
        await asyncio.sleep(LOAD_S)
        by_worker = await asyncio.to_thread(panels.query, PROMETHEUS, 'headrace_sampled_tokens_total{role="decode"}')
        self.note("tokens sampled by each decode worker", sorted(int(each["value"][1]) for each in by_worker))
        await self.kill(await busiest(client, "decode"))
        await ready(client, 3)
        await asyncio.sleep(LOAD_S)
        leaver = await busiest(client, "decode")
        container = await asyncio.to_thread(self.stack.container_at, "decode", leaver.address)
        began_s = time.monotonic()
        await asyncio.to_thread(container.stop, timeout=30)
        self.note("seconds that a decode container took to drain beside the load", round(time.monotonic() - began_s, 1))
        await asyncio.to_thread(container.reload)
        self.note("its exit code", container.attrs["State"]["ExitCode"])
        assert container.attrs["State"]["ExitCode"] == 0, "it did not drain"
        await ready(client, 2)


async def ready(client: AsyncClient, count: int) -> None:
    """Return when the router has so many ready decode workers and no other."""

    async def states() -> list[str]:
        return [worker.state for worker in (await client.server_info()).workers if worker.role != "prefill"]

    deadline_s = time.monotonic() + 120
    while (found := await states()) != ["ready"] * count:
        assert time.monotonic() < deadline_s, f"{found}, not {count} ready decode workers"
        await asyncio.sleep(0.2)


async def busiest(client: AsyncClient, role: str, least: int = 1) -> Any:
    """Return the worker that has most sequences now, when that are `least` or more."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        workers = [worker for worker in (await client.server_info()).workers if worker.role == role]
        worker = max(workers, key=lambda each: each.num_running + each.num_waiting)
        if worker.num_running + worker.num_waiting >= least:
            return worker
        await asyncio.sleep(0.02)
    raise AssertionError(f"no {role} worker runs anything")


def hold_to_no_rights(container: Any) -> None:
    """Raise AssertionError if a process may be root, write to its image, or gain rights."""
    code = "import os; print(os.geteuid()); open('/tmp/x', 'w').close(); open('/models/x', 'w')"
    exit_code, (output, error) = container.exec_run(["python", "-c", code], demux=True)
    assert (exit_code, output) == (1, b"10001\n"), (exit_code, output, error)
    assert b"Read-only file system: '/models/x'" in error, error
    status = container.exec_run(["cat", "/proc/1/status"]).output.decode()
    for line in ("Name:\ttini", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"):
        assert line in status.splitlines(), status


async def use(run: Run) -> None:
    """Send everything that this test sends."""
    async with AsyncClient(ROUTER, ConnectionOptions()) as client:
        await run.measure_bytes(client)
        wanted = await references(client, requests())
        run.note("requests whose answers were computed alone", len(wanted))
        await load.errands(client)
        until = asyncio.Event()
        clients = asyncio.create_task(
            run_clients(ROUTER, ConnectionOptions(), wanted, num_clients=NUM_CLIENTS, until=until)
        )
        try:
            await run.disturb(client)
            await asyncio.sleep(LOAD_S)  # the panels see what the killed one left behind
        finally:
            until.set()
            result = await clients
    run.note("answers that are exact, of these sampled", [result.num_exact, result.num_sampled])
    run.note("answers that are wrong", result.wrong)
    run.note("requests that failed", dict(result.errors))
    run.note("longest gap within an answer, seconds", round(result.slowest_gap_s, 2))
    assert not result.wrong, "a client got wrong tokens"
    assert not result.errors, "a request failed"
    assert result.num_exact > 100, "too few answers to mean anything"


def judge_panels(run: Run, rows: list[panels.Row]) -> None:
    """Note every query; raise AssertionError if one did not change that should."""
    run.facts["queries"] = [dataclasses.asdict(row) for row in rows]
    for row in rows:
        was, now = panels.in_words(row.at_rest), panels.in_words(row.changed)
        run.say(f"  {row.board} / {row.panel} / {row.legend}: {was} -> {now}")
    same = [f"{row.panel}: {row.legend}" for row in rows if row.changed is None]
    run.note("queries of panels", len(rows))
    run.note("queries that changed", len(rows) - len(same))
    run.note("queries that did not", same)
    unexpected = [name for name in same if name not in UNSEEN]
    assert not unexpected, f"not changed under load: {unexpected}"


def main() -> None:
    """Run; exit with 1 on any problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--without", type=Path, action="append", default=[], help="a compose file that leaves out images"
    )
    parser.add_argument(
        "--no-index", action="store_true", help="build of the wheels in build/wheels alone (make wheels)"
    )
    parser.add_argument("--keep-images", action="store_true", help="build nothing: take the images that are there")
    parser.add_argument(
        "--only-identities", action="store_true", help="with certificates and keys alone, of the images that are there"
    )
    arguments = parser.parse_args()
    test = Path(__file__).parent / "stack.yaml"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is taken down
    stack = Stack([BASE, test, *arguments.without], {})
    run = Run(stack, Console())
    if arguments.only_identities:
        return run.note("with certificates and keys", identities.check(arguments.without))
    keeps = arguments.keep_images
    run.note("engine", stack.engine.version()["Version"])
    try:
        run.note("images", images.look(stack) if keeps else images.build(stack, no_index=arguments.no_index))
        everything = set(stack.compose("--profile", "*", "config", "--images").split())
        run.note("images left out", sorted(everything - set(stack.compose("config", "--images").split())))
        run.start()
        watch = panels.Watch(PROMETHEUS)
        watch.start()
        try:
            asyncio.run(use(run))
        finally:
            judge_panels(run, watch.end())
    except BaseException:
        run.say(stack.compose("logs", "--tail", "40", *SERVICES))
        raise
    finally:
        down_s = stack.down()
        run.note("seconds that `down` took", round(down_s, 1))
        FACTS.write_text(json.dumps(run.facts, indent=1))
    run.note("with certificates and keys", identities.check(arguments.without))
    FACTS.write_text(json.dumps(run.facts, indent=1))
    assert down_s <= MOST_DOWN_S, f"down took {down_s:.1f} s"
    run.say(f"every check passed; {FACTS}")


if __name__ == "__main__":
    sys.exit(main())
