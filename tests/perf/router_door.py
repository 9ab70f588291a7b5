"""The router under callers that mean no good: memory, refusals, and what everybody else feels meanwhile.

    python tests/perf/router_door.py                  # every attack, one JSON line each
    python tests/perf/router_door.py bodies --size 4000000 --calls 300 --queue 32

Three processes besides this one: the real router with a heartbeat on its event loop, a fake worker at 50 steps a
second, and the attacker. This one asks health and GetServerInfo, scrapes the metrics, and reads a healthy stream.
Every figure is of that router: RSS in MiB, the longest time its loop did not come round, the slowest answers, the
healthy stream's longest gap between two messages, and how the attacker's calls ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Generator
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.v1 import generation_service_pb2 as pb
from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub
from headrace_core import rpc
from headrace_core.api_keys import ApiKey, write_entry
from headrace_core.config import RouterSettings
from headrace_core.telemetry import serve_metrics
from headrace_router.service import RouterService
from headrace_router.testing import text_request, write_tokenizer

_BEAT_S = 0.005
_PROBE_S = 0.05
_CALL_TIMEOUT_S = 60.0
_TOKEN, _HOSTILE_TOKEN = "hr_bystander_x", "hr_hostile_x"
_NO_POOL = ("grpc.use_local_subchannel_pool", 1)
"""Each channel has a connection of its own."""


# The router, in a process of its own.


async def _serve(folder: Path, worker: str, options: dict[str, Any]) -> None:
    """Run a router; on each line of standard input answer with the longest beat since the last."""
    longest_s = 0.0

    async def beat() -> None:
        nonlocal longest_s
        while True:
            start_s = time.monotonic()
            await asyncio.sleep(_BEAT_S)
            longest_s = max(longest_s, time.monotonic() - start_s - _BEAT_S)

    settings = RouterSettings(model=folder / "tiny", listen="127.0.0.1:0", workers=worker, **options)
    service = RouterService(settings)
    metrics = serve_metrics("127.0.0.1:0", service.registry, "router")
    address = await service.start()
    beating = asyncio.create_task(beat())
    sys.stdout.write(json.dumps({"address": address, "metrics": metrics}) + "\n")
    sys.stdout.flush()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.readline():
        sys.stdout.write(json.dumps({"stall_ms": round(1000 * longest_s, 1)}) + "\n")
        sys.stdout.flush()
        longest_s = 0.0
    beating.cancel()
    await service.stop()


class Router:
    """The process under test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        self.addresses = self._line()

    def stall_ms(self) -> float:
        """Return the longest time its loop did not come round since the last call."""
        assert self._process.stdin is not None, "stdin is a pipe"
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._line()["stall_ms"]

    def rss_mib(self, name: str = "VmRSS") -> int:
        """Return its memory now, or with VmHWM the most it ever was."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) >> 10

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "stdout is a pipe"
        return json.loads(self._process.stdout.readline())


# The attacker, in a process of its own.


async def _attack(kind: str, address: str, *, calls: int, size: int, connections: int, token: str) -> dict[str, Any]:
    options = [("grpc.max_send_message_length", -1), _NO_POOL]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(connections)]
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    body = text_request("x" * size, sampling={"max_tokens": 4}).SerializeToString()
    ends: dict[str, list[float]] = {}

    async def one(number: int) -> None:
        channel = channels[number % connections]
        start_s = time.monotonic()
        path = "/headrace.v1.GenerationService/Generate"
        if kind == "slow":
            call: Any = channel.stream_stream(path)(timeout=_CALL_TIMEOUT_S, metadata=metadata)
        else:
            call = channel.unary_stream(path)(body, timeout=_CALL_TIMEOUT_S, metadata=metadata)
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
            end = "OK"
        except grpc.aio.AioRpcError as error:
            reason = dict(error.trailing_metadata() or ()).get(rpc.REASON_KEY, "without reason")
            end = f"{error.code().name} {reason}"
        ends.setdefault(end, []).append(time.monotonic() - start_s)

    await asyncio.gather(*(one(number) for number in range(calls)))
    for channel in channels:
        await channel.close()
    return {
        end: {"calls": len(took), "first_s": round(min(took), 2), "last_s": round(max(took), 2)}
        for end, took in sorted(ends.items())
    }


# The bystanders, in this process.


class Bystanders:
    """Everybody else: asks, scrapes and streams until told to stop."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._slowest_s: dict[str, float] = defaultdict(float)
        self._failures: Counter[str] = Counter()
        self._most_mib = 0
        self._is_over = False

    async def run(self, attack: Awaitable[Any]) -> dict[str, Any]:
        """Go on while `attack` does; return what was felt."""
        address = self._router.addresses["address"]
        async with rpc.channel(address) as channel:
            stub: Any = GenerationServiceStub(channel)
            health = health_pb2_grpc.HealthStub(channel)
            metadata = (("authorization", f"Bearer {_TOKEN}"),)
            url = f"http://{self._router.addresses['metrics']}/metrics"

            async def info() -> None:
                await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=_CALL_TIMEOUT_S, metadata=metadata)

            async def check() -> None:
                await health.Check(health_pb2.HealthCheckRequest(), timeout=_CALL_TIMEOUT_S)

            async def scrape() -> None:
                await asyncio.to_thread(_scrape, url)

            asking = [
                asyncio.create_task(self._ask(name, ask))
                for name, ask in (("server_info", info), ("health", check), ("metrics", scrape))
            ]
            streaming = asyncio.create_task(self._stream(stub, metadata))
            watching = asyncio.create_task(self._watch())
            ends = await attack
            self._is_over = True
            await asyncio.gather(*asking, watching)
            streaming.cancel()
            await asyncio.gather(streaming, return_exceptions=True)
        slowest = {f"slowest_{name}_ms": round(1000 * took_s) for name, took_s in sorted(self._slowest_s.items())}
        return {"ends": ends, "most_rss_mib": self._most_mib, **slowest, "bystanders_failed": dict(self._failures)}

    async def _ask(self, name: str, ask: Callable[[], Awaitable[None]]) -> None:
        while not self._is_over:
            start_s = time.monotonic()
            try:
                await ask()
            except (grpc.aio.AioRpcError, OSError) as error:
                self._failures[f"{name}: {error!s:.80}"] += 1
            self._slowest_s[name] = max(self._slowest_s[name], time.monotonic() - start_s)
            await asyncio.sleep(_PROBE_S)

    async def _stream(self, stub: Any, metadata: Any) -> None:
        """Read healthy answers, one after the other."""
        while not self._is_over:
            request = text_request("Once", sampling={"max_tokens": 900, "ignore_eos": True})
            last_s = 0.0
            try:
                async for _ in stub.Generate(request, metadata=metadata, timeout=_CALL_TIMEOUT_S):
                    now_s = time.monotonic()
                    if last_s:
                        self._slowest_s["token"] = max(self._slowest_s["token"], now_s - last_s)
                    last_s = now_s
            except grpc.aio.AioRpcError as error:
                self._failures[f"stream: {error.code().name}"] += 1
                await asyncio.sleep(_PROBE_S)

    async def _watch(self) -> None:
        while not self._is_over:
            self._most_mib = max(self._most_mib, self._router.rss_mib())
            await asyncio.sleep(0.01)


def _scrape(url: str) -> None:
    with urllib.request.urlopen(url, timeout=_CALL_TIMEOUT_S) as response:
        response.read()


async def _attacker(options: argparse.Namespace, address: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--attack", options.attack, "--address", address]
    for name in ("calls", "size", "connections"):
        command += [f"--{name}", str(getattr(options, name))]
    if not options.without_token:
        command += ["--token", _HOSTILE_TOKEN]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    return json.loads(output)


async def _measure(router: Router, options: argparse.Namespace) -> dict[str, Any]:
    await Bystanders(router).run(asyncio.sleep(2.0))  # caches and connections are warm, the fleet is there
    rss_mib = router.rss_mib()
    router.stall_ms()
    felt = await Bystanders(router).run(_attacker(options, router.addresses["address"]))
    after_mib = router.rss_mib()
    return {"rss_mib": rss_mib, "stall_ms": router.stall_ms(), **felt, "rss_after_mib": after_mib}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return one attack's figures."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write_tokenizer(Path(folder) / "tiny")
        command = [sys.executable, "-m", "headrace_core.testing.fake_worker", "--role", "both", "--vocab-size", "258"]
        worker = stack.enter_context(_process([*command, "--step-ms", "20"]))
        assert worker.stdout is not None, "stdout is a pipe"
        entries = (ApiKey(key.split("_")[1], sha256(key.encode()).digest()) for key in (_TOKEN, _HOSTILE_TOKEN))
        keys_file = Path(folder) / "keys.toml"
        keys_file.write_text("\n".join(map(write_entry, entries)))
        settings = {"keys_file": str(keys_file), "max_queued_requests": options.queue}
        serve = ["--serve", folder, "--worker", worker.stdout.readline().strip(), "--settings", json.dumps(settings)]
        router = Router(stack.enter_context(_process([sys.executable, __file__, *serve])))
        figures = asyncio.run(_measure(router, options))
    sent = {"kind": options.attack, "calls": options.calls, "size": options.size, "queue": options.queue}
    return {**sent, "token": not options.without_token, **figures}


@contextlib.contextmanager
def _process(command: list[str]) -> Generator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=20)


ATTACKS = (
    ("bodies", "--calls", "300", "--size", "4000000", "--queue", "32"),
    ("bodies", "--calls", "150", "--size", "6000000", "--without-token"),
    ("burst", "--calls", "2000", "--size", "10"),
    ("burst", "--calls", "2000", "--size", "10", "--connections", "20"),
    ("slow", "--calls", "500", "--connections", "20"),
)
"""What is measured without arguments."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the router under hostile callers.")
    parser.add_argument("attack", nargs="?", choices=["bodies", "burst", "slow"])
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--size", type=int, default=10, help="of each prompt, bytes")
    parser.add_argument("--queue", type=int, default=1024, help="--max-queued-requests")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--without-token", action="store_true")
    parser.add_argument("--attack", dest="attack_as", help=argparse.SUPPRESS)
    for name in ("--address", "--token", "--serve", "--worker", "--settings"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Print one JSON line for each attack."""
    parser = _parser()
    options = parser.parse_args()
    if options.serve:
        uvloop.run(_serve(Path(options.serve), options.worker, json.loads(options.settings)))
        return
    if options.attack_as:
        limits = {name: getattr(options, name) for name in ("calls", "size", "connections", "token")}
        sys.stdout.write(json.dumps(asyncio.run(_attack(options.attack_as, options.address, **limits))) + "\n")
        return
    for attack in [options] if options.attack else [parser.parse_args(arguments) for arguments in ATTACKS]:
        sys.stdout.write(json.dumps(measure(attack)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
