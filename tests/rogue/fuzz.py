"""`python -m tests.rogue.fuzz`: spoilt messages on every rpc of every service of real processes, over mutual TLS.

A router, a prefill and a decode worker with the demo model. Each rpc has `--messages` of them, shared by the processes
that serve it, in two halves; then come those of Drain, by an operator, who is obeyed. Prints what became of them and
writes build/fuzz.json; exits with 1 if a call ended with an error of ours, with no reason of ours or not at all, if a
process wrote a traceback, ended or kept a page, if an honest client's answer changed, or if a process has over 2 MiB
more after the second half than after the first.

Memory is a process's resident set when it has nothing to do. What was freed lies about in it for a while: it goes up
and down by some 6 MiB at the same work. So a half has four rounds, and what it ends with is the least after its last
three.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvloop
from headrace.v1 import worker_service_pb2, worker_service_pb2_grpc
from headrace_client import AsyncClient, ConnectionOptions, SamplingParams
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_client.commands.certs import make
from headrace_core import rpc
from headrace_core.identity import ChannelTls, Identity, Role
from headrace_core.testing.async_test import WAIT_S
from headrace_core.wire import decode_layout

from tests.perf.machine import machine
from tests.rogue.flood import Facts, Target, flood, problems, targets
from tests.rogue.standard import standard_targets

ROOT = Path(__file__).parents[2]
MOST_GROWTH_MIB = 2.0
NUM_ROUNDS = 4
"""Of a half."""
_WORKERS = (Role.PREFILL, Role.DECODE)
_OF_EVERY_WORKER = ("/headrace.v1.WorkerService/", "/headrace.v1.TransferService/")
_DRAIN = "/headrace.v1.WorkerService/Drain"
_SMALL = {"kv-pool-mib": 2, "page-size": 16, "max-context-tokens": 256}
"""What is refused for its length is refused before it is computed, and the pool is full soon."""
_SAMPLING = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@dataclass
class Fleet:
    """The processes, and what they wrote. See `flood.Place`."""

    cluster: LocalCluster
    metadata: Sequence[tuple[str, str]] = ()
    tracebacks: list[str] = field(default_factory=list)
    wanted: tuple[int, ...] = ()

    def tls(self, role: Role, server: Role) -> ChannelTls:
        """Return what `role` reaches a `server` with."""
        assert self.cluster.tls
        identity = Identity(self.cluster.tls / role.value, role)
        return identity.to_router() if server is Role.ROUTER else identity.to_worker()

    def channel(self, role: Role, server: Role) -> Any:
        """See `flood.Place`."""
        return rpc.own_channel(self.process(server).address, tls=self.tls(role, server))

    def process(self, role: Role) -> Any:
        return next(process for process in self.cluster.processes if process.role == role.value)

    async def check(self) -> None:
        """Generate as an honest client does, and see that the answer is what it always was."""
        assert self.cluster.tls
        options = ConnectionOptions(identity=self.cluster.tls / "client")
        async with AsyncClient(self.cluster.router_address, options) as client:
            answer = await client.generate(list(range(2, 41)), _SAMPLING, timeout_s=WAIT_S)
        self.wanted = self.wanted or answer.token_ids
        assert answer.token_ids == self.wanted, "an honest client's answer is another one now"

    async def info(self, role: Role) -> Any:
        """Return what a worker says it is."""
        async with self.channel(Role.OPERATOR, role) as channel:
            stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
            return await stub.GetInfo(worker_service_pb2.GetInfoRequest(), timeout=WAIT_S)

    async def rest(self) -> None:
        """Wait until no worker has a sequence, a lease or a page that is not free."""
        for role in _WORKERS:
            num_pages = (await self.info(role)).num_pages
            async with self.channel(Role.OPERATOR, role) as channel:
                stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
                call = stub.WatchLoad(worker_service_pb2.WatchLoadRequest(min_interval_ms=50))
                async with asyncio.timeout(WAIT_S):
                    async for load in call:
                        if load.num_free_pages == num_pages and not (load.num_running + load.num_waiting):
                            break
                call.cancel()

    def memory_mib(self) -> dict[str, float]:
        """Return what each process has in memory: its resident set."""
        return {process.name: _rss_mib(process.pid) for process in self.cluster.processes}


@asynccontextmanager
async def fleet(folder: Path) -> AsyncGenerator[Fleet]:
    """Start the processes; afterwards see that none has ended by itself."""
    make(folder / "identities")
    it = Fleet(
        LocalCluster(
            ROOT / "demo" / "model",
            tls=folder / "identities",
            worker_options=_SMALL | {"transport": "grpc", "threads": 1, "log-level": "WARNING"},
            router_options={"log-level": "ERROR"},
        )
    )

    def look(name: str, line: str) -> None:
        if "Traceback" in line or "unhandled error" in line:
            it.tracebacks.append(f"{name}: {line}")

    it.cluster.log_sink = look
    await asyncio.to_thread(it.cluster.start)
    try:
        await it.check()
        yield it
        ended = [process.name for process in it.cluster.processes if process.poll() is not None]
        assert not ended, f"ended by themselves: {ended}"
    finally:
        await asyncio.to_thread(it.cluster.stop)


@dataclass(frozen=True, slots=True)
class Row:
    """What became of the messages of one rpc at one process."""

    target: Target
    outcomes: Counter[str]
    seconds: float

    def __str__(self) -> str:
        most = ", ".join(f"{name} {count}" for name, count in self.outcomes.most_common())
        at = f"{self.target.method} | {self.target.server.value}"
        return f"| {at} | {self.outcomes.total()} | {self.seconds:.0f} | {most} |"


async def every_target(it: Fleet) -> list[Target]:
    """Return every rpc at every process that serves it; Drain last, by an operator."""
    found: list[Target] = []
    for server in (Role.ROUTER, *_WORKERS):
        is_worker = server is not Role.ROUTER
        info = await it.info(server if is_worker else Role.PREFILL)
        for target in targets(Facts(info.model_fingerprint, decode_layout(info.layout), info.incarnation)):
            if target.server is server or (is_worker and target.method.startswith(_OF_EVERY_WORKER)):
                caller = Role.OPERATOR if target.method == _DRAIN else target.caller
                found.append(replace(target, server=server, caller=caller))
        found += standard_targets(server)
    return sorted(found, key=lambda target: target.method == _DRAIN)


async def fuzz(it: Fleet, num_messages: int, say: Any = lambda line: None) -> dict[str, Any]:
    """Send so many messages to each rpc and return the report."""
    found = await every_target(it)
    num_servers = Counter(target.method for target in found)
    rows: list[Row] = []
    memory: list[dict[str, Any]] = []
    for name, is_drain in (("all others", False), ("Drain", True)):
        group = [target for target in found if (target.method == _DRAIN) is is_drain]
        for number in range(2 * NUM_ROUNDS):
            for target in group:
                share = -(-num_messages // (2 * NUM_ROUNDS * num_servers[target.method]))
                began_s = time.monotonic()
                row = Row(target, await flood(it, target, share, seed=number), time.monotonic() - began_s)
                rows.append(row)
                say(str(row))
            await it.rest()
            if not is_drain:
                await it.check()
            memory.append({"of": name, "half": 1 + number // NUM_ROUNDS, "mib": it.memory_mib()})
            say(str(memory[-1]))
    growth = {name: _growth_mib(memory, name) for name in ("all others", "Drain")}
    found_problems = [f"{row.target.method}: {name}" for row in rows for name in problems(row.outcomes)]
    found_problems += [
        f"{process} has {mib:.1f} MiB more after the second half of {name} than after the first"
        for name, by_process in growth.items()
        for process, mib in by_process.items()
        if mib > MOST_GROWTH_MIB
    ]
    return {
        "machine": machine(),
        "messages": sum(row.outcomes.total() for row in rows),
        "rows": _rows(rows),
        "memory": memory,
        "growth_mib": growth,
        "tracebacks": it.tracebacks,
        "problems": found_problems + it.tracebacks,
    }


def _growth_mib(memory: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Return what each process has more after the second half than after the first."""
    least: list[dict[str, float]] = []
    for half in (1, 2):
        last = [each["mib"] for each in memory if (each["of"], each["half"]) == (name, half)][1:]
        least.append({process: min(each[process] for each in last) for process in last[0]})
    return {process: round(least[1][process] - least[0][process], 2) for process in least[0]}


def _rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    joined: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row.target.method, row.target.server.value)
        into = joined.setdefault(key, {"rpc": key[0], "at": key[1], "messages": 0, "seconds": 0.0, "outcomes": {}})
        into["messages"] += row.outcomes.total()
        into["seconds"] = round(into["seconds"] + row.seconds, 1)
        into["outcomes"] = dict((Counter(into["outcomes"]) + row.outcomes).most_common())
    return list(joined.values())


def _rss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (found,) = [line for line in lines if line.startswith("VmRSS:")]
    return int(found.split()[1]) / 1024


async def _run(num_messages: int) -> dict[str, Any]:
    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory() as folder:
        async with fleet(Path(folder)) as it:
            report = await fuzz(it, num_messages, say)
    say("\n| rpc | at | messages | seconds | what became of them |\n|---|---|--:|--:|---|")
    for row in report["rows"]:
        became = ", ".join(f"{name} {count}" for name, count in row["outcomes"].items())
        say(f"| {row['rpc']} | {row['at']} | {row['messages']} | {row['seconds']:.0f} | {became} |")
    say(f"MiB more after the second half: {report['growth_mib']}")
    for problem in report["problems"]:
        say(f"PROBLEM {problem}")
    say(f"{report['messages']} messages, {len(report['problems'])} problems")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000, help="for each rpc")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz.json")
    arguments = parser.parse_args()
    report = uvloop.run(_run(arguments.messages))
    out: Path = arguments.out
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(1 if report["problems"] else 0)


if __name__ == "__main__":
    main()
