"""How long a decode worker takes to be gone, amid long streams, and what its streams notice of it.

    python -m tests.perf.drain [--streams 8] [--tokens 2000] [--without-other]

A prefill and a decode worker run the demo model; when every stream has some tokens a second decode worker joins, and
the first gets SIGTERM. Printed: seconds from there to its exit, and the longest gap between two tokens of a stream
before and after; the JSON has each stream's. The grace is long enough for every stream to end where it is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.request import SamplingParams

from tests.perf.machine import machine

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "demo" / "model"
PROMPT = "Once upon a time there was a little fox named Zorvim."
TOKENS_BEFORE = 100
GRACE_S = 600.0


class Stream:
    """One stream, and when its tokens came."""

    def __init__(self, client: AsyncClient, number: int, num_tokens: int) -> None:
        self.came_s: list[float] = []
        sampling = SamplingParams(temperature=0.8, seed=number, max_tokens=num_tokens, ignore_eos=True)
        self.task = asyncio.create_task(self._read(client.stream(f"{PROMPT} {number}", sampling, timeout_s=GRACE_S)))

    async def _read(self, stream: Any) -> None:
        async with stream:
            async for delta in stream:
                self.came_s += [time.monotonic()] * len(delta.token_ids)

    def longest_gap_s(self, start_s: float, end_s: float) -> float:
        """Return the longest time without a token that began in this time."""
        pairs = zip(self.came_s, self.came_s[1:], strict=False)
        return max((after - before for before, after in pairs if start_s <= before < end_s), default=0.0)


async def measure(cluster: LocalCluster, num_streams: int, num_tokens: int, *, has_other: bool) -> dict[str, Any]:
    """Return one run's raw figures."""
    async with AsyncClient(cluster.router_address) as client:
        streams = [Stream(client, number, num_tokens) for number in range(num_streams)]
        while min(len(stream.came_s) for stream in streams) < TOKENS_BEFORE:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
        if has_other:
            await asyncio.to_thread(cluster.add_decode)
        quiet_s = time.monotonic()
        await asyncio.sleep(2.0)
        leaving = next(process for process in cluster.workers if process.role == "decode")
        num_before = [len(stream.came_s) for stream in streams]
        began_s = time.monotonic()
        leaving.terminate()
        await asyncio.to_thread(leaving.wait, GRACE_S)
        drain_s = time.monotonic() - began_s
        num_then = [len(stream.came_s) for stream in streams]
        await asyncio.gather(*(stream.task for stream in streams))
    return {
        "drain_s": drain_s,
        "exit_code": leaving.poll(),
        "tokens_at_sigterm": num_before,
        "tokens_at_exit": num_then,
        "tokens": [len(stream.came_s) for stream in streams],
        "longest_gap_before_s": [stream.longest_gap_s(quiet_s, began_s - 0.5) for stream in streams],
        "longest_gap_after_s": [stream.longest_gap_s(began_s - 0.5, began_s + 5.0) for stream in streams],
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--without-other", action="store_true", help="the decode worker is the only one")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench" / "drain.json")
    arguments = parser.parse_args()
    options = {"threads": 1, "drain-s": GRACE_S, "max-step-sequences": 2 * arguments.streams}
    with LocalCluster(MODEL, worker_options=options) as cluster:
        run = measure(cluster, arguments.streams, arguments.tokens, has_other=not arguments.without_other)
        result = asyncio.run(run)
    report = {"machine": machine(), "command": sys.argv, "worker_options": options, **result}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    before, after = (max(result[f"longest_gap_{when}_s"]) for when in ("before", "after"))
    median = statistics.median(result["longest_gap_after_s"])
    sys.stdout.write(
        f"drain {result['drain_s']:.2f} s; longest gap before {before:.3f} s, after {after:.3f} s "
        f"(median {median:.3f} s); {machine()}; {arguments.json}\n"
    )


if __name__ == "__main__":
    main()
