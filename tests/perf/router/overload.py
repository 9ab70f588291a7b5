"""What a router does with three times what its workers can: who is served keeps its times, the rest hear 429 at once.

    python -m tests.perf.router.overload --seconds 60

A fake decode worker with so many places, each answer so many steps, makes a capacity that is known: places / (tokens
× step). Clients come by a Poisson process over HTTP, first at nine tenths of it, then at three times; one client more
asks and never reads. Writes build/bench/overload.json: goodput at both, how long 429 took from sending a request to its
answer's end, the router's memory, and whether every request had an end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import uvloop
from headrace_client.bench.block import block
from headrace_client.bench.figures import figures_of
from headrace_client.bench.goodput import parse_goodput
from headrace_client.bench.http_target import HttpOptions, HttpTarget
from headrace_client.bench.load import Arrivals, Load
from headrace_client.bench.prompts import Part, Session, Turn
from headrace_client.bench.record import Record

from tests.perf.closed_loop import percentiles
from tests.perf.cpu_time import family
from tests.perf.machine import machine
from tests.perf.router import sides

_REPORT = Path("build/bench/overload.json")
_TOKENS, _STEP_MS = 16, 20.0
_SHED = "QUEUE_FULL"


def rss_mib(pid: int) -> float:
    """Return the memory in use by a process and all that descend from it."""
    total = 0
    for each in family(pid):
        for line in Path(f"/proc/{each}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                total += int(line.split()[1])
    return total / 1024


async def never_read(address: str) -> asyncio.StreamWriter:
    """Ask for a long stream and read nothing of it."""
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1)
    body = json.dumps({"prompt": "x", "max_tokens": 50_000, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    writer.write(f"{head}\r\n\r\n".encode() + body)
    writer.transport.pause_reading()  # pyright: ignore
    return writer


async def load(side: sides.Side, rate: float, seconds: float, slo: str) -> dict[str, Any]:
    """Return what so many requests a second saw, and the router's memory."""
    sessions = [Session([Turn([Part((0, i), 50)], _TOKENS)]) for i in range(round(rate * seconds))]
    target = HttpTarget(f"http://{side.address}", HttpOptions(side.model, counts_always=False))
    running = Load(target, sessions, Arrivals(rate=rate), vocab_size=256)
    silent = await never_read(side.address)
    before_mib, peak_mib = rss_mib(side.pid), 0.0
    task = asyncio.create_task(running.run())
    while not task.done():
        peak_mib = max(peak_mib, rss_mib(side.pid))
        await asyncio.wait([task], timeout=0.5)
    records = await task
    silent.close()
    await target.close()
    figures = figures_of(records, parse_goodput(slo))
    sys.stdout.write(f"{rate:.1f} requests/s\n{block(figures, {'rate': rate})}\n")
    return {
        "rate": rate,
        "figures": figures,
        "shed_ms": _times(records),
        "not_shed_nor_served": sum(1 for each in records if not each.is_ok and each.error != _SHED),
        "lost": len(sessions) - len(records),
        "rss_mib": {"before": before_mib, "peak": peak_mib},
    }


def _times(records: list[Record]) -> dict[str, float] | None:
    shed = [1e3 * (each.end_s - each.sent_s) for each in records if each.error == _SHED]
    return percentiles(shed) | {"count": len(shed)} if shed else None


def main() -> None:
    """Run both loads, print, write."""
    parser = argparse.ArgumentParser(description="Ask a router for three times what its workers can do.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--places", type=int, default=9, help="of the decode worker; one is kept for other clients")
    parser.add_argument("--queue", type=int, default=8, help="--max-queued-requests")
    parser.add_argument("--goodput", default="ttft:1000,itl:200")
    parser.add_argument("--json", type=Path, default=_REPORT)
    options = parser.parse_args()
    # One place is kept from a client that has others, and one is the silent client's until it is cut off.
    capacity = (options.places - 2) / (_TOKENS * _STEP_MS / 1000)
    router = ("--max-queued-requests", str(options.queue))
    runs: dict[str, Any] = {}
    with sides.ours(_STEP_MS, options=router, places=options.places) as (side, _):
        for name, share in (("at_1x", 0.9), ("at_3x", 3.0)):
            runs[name] = uvloop.run(load(side, share * capacity, options.seconds, options.goodput))
    found = {
        "capacity_requests_per_s": capacity,
        "goodput_3x_vs_1x": runs["at_3x"]["figures"]["request_goodput"] / runs["at_1x"]["figures"]["request_goodput"],
        "shed_ms_p99": (runs["at_3x"]["shed_ms"] or {}).get("p99"),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({**machine(), "command": sys.argv, **found, **runs}, indent=1) + "\n")
    sys.stdout.write(json.dumps(found | {name: run["rss_mib"] for name, run in runs.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
