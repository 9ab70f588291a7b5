"""How long the router takes to see that a worker is stopped, and what clients notice of it, on a busy machine.

    python -m tests.perf.silent_worker [--tries 20] [--roles decode prefill] [--streams 6] [--burners 2]

Two prefill and two decode workers run the demo model under streams that never pause; `burners` processes compute
nothing, as fast as they can. A worker that has something to do gets SIGSTOP, and SIGCONT when the router has said that
it is gone. Printed, for each role: seconds from the signal to the router's line, and the longest that a client waited
for its next token. Then the router itself is stopped for three seconds, again and again: it should call no worker lost.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace_client import AsyncClient
from headrace_client.cluster.cluster_process import ClusterProcess
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S

from tests.load.burners import burning
from tests.perf.machine import machine

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "demo" / "model"
PROMPT = "Once upon a time there was a little fox named Zorvim."
NUM_TOKENS = {"decode": 400, "prefill": 4}
"""Of each answer: few where prompts are to be computed all the time."""
ROUTER_AWAY_S = 3.0
ROUTER_TRIES = 5
_GONE = "worker is unreachable"


class Lines:
    """When the router said that a worker is gone: (seconds, line), in order. Any thread."""

    def __init__(self) -> None:
        self.gone: list[tuple[float, str]] = []

    def __call__(self, name: str, line: str) -> None:
        """Take a line; `LocalCluster.log_sink`."""
        if name.startswith("router") and _GONE in line:
            self.gone.append((time.monotonic(), line))

    def since(self, start_s: float, address: str = "") -> list[float]:
        """Return when it said so after `start_s`, of one worker or of any."""
        return [at_s for at_s, line in self.gone if at_s >= start_s and address in line]


class Streams:
    """Clients that ask again and again, and how long each waited for a token: (from, to), seconds."""

    def __init__(self, client: AsyncClient, count: int) -> None:
        self.waits: list[tuple[float, float]] = []
        self.role = "decode"
        self._client = client
        self._numbers = itertools.count()
        self._tasks = [asyncio.create_task(self._repeat()) for _ in range(count)]

    async def _repeat(self) -> None:
        while True:
            number = next(self._numbers)
            sampling = SamplingParams(seed=number, max_tokens=NUM_TOKENS[self.role], ignore_eos=True)
            before_s = time.monotonic()
            # Another prompt each time: none is found in a cache.
            async with self._client.stream(f"{number} {PROMPT * 8}", sampling) as stream:
                async for _ in stream:
                    now_s = time.monotonic()
                    self.waits.append((before_s, now_s))
                    before_s = now_s

    def longest_s(self, start_s: float, end_s: float) -> float:
        """Return the longest wait that was under way in this time."""
        return max((to - begin for begin, to in self.waits if begin < end_s and to > start_s), default=0.0)

    async def close(self) -> None:
        """End; raise what a client was told."""
        failed = [task.exception() for task in self._tasks if task.done()]
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for error in failed:
            assert error is None, f"a client was told {error}"


async def measure(cluster: LocalCluster, lines: Lines, roles: Sequence[str], tries: int, count: int) -> dict[str, Any]:
    """Return the raw figures."""
    result: dict[str, Any] = {}
    async with AsyncClient(cluster.router_address) as client:
        streams = Streams(client, count)
        for role in roles:
            streams.role = role
            # Always the same one: a stream that loses two workers ends with RETRIES_EXHAUSTED.
            victim = next(process for process in cluster.workers if process.role == role)
            rows = [await _stop(client, streams, lines, victim) for _ in range(tries)]
            result[role] = {"verdict_s": [row[0] for row in rows], "longest_wait_s": [row[1] for row in rows]}
        began_s = time.monotonic()
        for _ in range(ROUTER_TRIES):
            cluster.router.send_signal(signal.SIGSTOP)
            await asyncio.sleep(ROUTER_AWAY_S)
            cluster.router.send_signal(signal.SIGCONT)
            await asyncio.sleep(ROUTER_AWAY_S)
        result["lost_by_a_stopped_router"] = len(lines.since(began_s))
        await streams.close()
    return result


async def _stop(client: AsyncClient, streams: Streams, lines: Lines, victim: ClusterProcess) -> tuple[float, float]:
    """Stop a worker amid work; return how long the router and, at most, a client took."""
    await _until(client, victim, is_busy=True)
    began_s = time.monotonic()
    victim.send_signal(signal.SIGSTOP)
    try:
        async with asyncio.timeout(WAIT_S):
            while not lines.since(began_s, victim.address):  # noqa: ASYNC110 - another thread hears it
                await asyncio.sleep(0.02)
    finally:
        victim.send_signal(signal.SIGCONT)
    verdict_s = lines.since(began_s, victim.address)[0] - began_s
    await _until(client, victim)
    await asyncio.sleep(1.0)
    return verdict_s, streams.longest_s(began_s, began_s + verdict_s)


async def _until(client: AsyncClient, process: ClusterProcess, *, is_busy: bool = False) -> None:
    """Return when all workers are ready, and this one does something if it should."""
    async with asyncio.timeout(WAIT_S):
        while True:
            workers = (await client.server_info()).workers
            found = next(worker for worker in workers if worker.address == process.address)
            does = found.num_running + found.num_waiting + found.num_leases
            if all(worker.state == "ready" for worker in workers) and (does or not is_busy):
                return
            await asyncio.sleep(0.02)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20, help="of each role")
    parser.add_argument("--roles", nargs="+", choices=("decode", "prefill"), default=["decode", "prefill"])
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--burners", type=int, default=2)
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench" / "silent-worker.json")
    arguments = parser.parse_args()
    lines = Lines()
    options = {"threads": 1}
    with (
        burning(arguments.burners),
        LocalCluster(MODEL, num_prefill=2, num_decode=2, worker_options=options, log_sink=lines) as cluster,
    ):
        run = measure(cluster, lines, arguments.roles, arguments.tries, arguments.streams)
        result = asyncio.run(run)
    report = {"machine": machine(), "command": sys.argv, "worker_options": options, **result}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    for role in arguments.roles:
        verdicts, waits = result[role]["verdict_s"], result[role]["longest_wait_s"]
        sys.stdout.write(
            f"{role}: from SIGSTOP to the router's verdict, {len(verdicts)} tries: "
            f"p50 {statistics.median(verdicts):.2f} s, p100 {max(verdicts):.2f} s; a client waited at most "
            f"p50 {statistics.median(waits):.2f} s, p100 {max(waits):.2f} s\n"
        )
    sys.stdout.write(
        f"router stopped for {ROUTER_AWAY_S:.0f} s, {ROUTER_TRIES} times: {result['lost_by_a_stopped_router']} workers "
        f"called lost; {machine()}; {arguments.json}\n"
    )


if __name__ == "__main__":
    main()
