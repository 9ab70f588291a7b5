"""What it changes that workers lend each other their threads: `python -m tests.perf.lending CHECKPOINT`.

Two clusters of a router, a prefill and a decode worker with a thread each, alike but for `--lend-threads`, take turns
at the same closed loop: prompts of 256 random tokens, answers of 128. One of them serves while the other one sleeps.
A figure is the median over the rounds; `ratio` the median of the ratios of the rounds, each of which is one pair: below
1, lending is faster. Writes build/bench/lending.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.request import SamplingParams

from tests.perf.machine import machine

_log = logging.getLogger(__name__)
_REPORT = Path("build/bench/lending.json")
_PROMPT_TOKENS = 256
_OUTPUT_TOKENS = 128
_WORKER = {"threads": 1, "kv-pool-mib": 512, "roofline-every-steps": 0}
_TIMEOUT_S = 300.0

Figures = dict[str, float]


async def _serve(address: str, concurrency: int, num_requests: int, rng: random.Random) -> Figures:
    """Return seconds to a first token and between tokens, and tokens a second, of a closed loop."""
    prompts = [[rng.randrange(16, 1024) for _ in range(_PROMPT_TOKENS)] for _ in range(num_requests)]
    firsts: list[float] = []
    gaps: list[float] = []
    sampling = SamplingParams(max_tokens=_OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)

    async def lane(client: AsyncClient) -> None:
        while prompts:
            last = time.perf_counter()
            begun, is_first = last, True
            async with client.stream(prompts.pop(), sampling, timeout_s=_TIMEOUT_S) as stream:
                async for delta in stream:
                    if not delta.token_ids:
                        continue
                    now = time.perf_counter()
                    if is_first:
                        firsts.append(now - begun)
                    else:
                        gaps.append(now - last)
                    last, is_first = now, False

    began = time.perf_counter()
    async with AsyncClient(address) as client:
        await asyncio.gather(*(lane(client) for _ in range(concurrency)))
    return {
        "ttft_p50_ms": statistics.median(firsts) * 1e3,
        "ttft_p99_ms": _p99(firsts) * 1e3,
        "itl_p50_ms": statistics.median(gaps) * 1e3,
        "itl_p99_ms": _p99(gaps) * 1e3,
        "tokens_per_s": num_requests * _OUTPUT_TOKENS / (time.perf_counter() - began),
    }


def _p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def _summary(pairs: list[dict[str, Figures]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what in pairs[0]["kept"]:
        kept, lent = ([pair[name][what] for pair in pairs] for name in ("kept", "lent"))
        ratios = [b / a for a, b in zip(kept, lent, strict=True)]
        found[what] = {
            "kept": round(statistics.median(kept), 1),
            "lent": round(statistics.median(lent), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return found


def _main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8, 32])
    options = parser.parse_args()
    # A worker of a cluster lends in the cluster's own folder unless it is told otherwise.
    folder = _REPORT.parent / "lent"
    clusters = {
        "kept": LocalCluster(options.checkpoint, worker_options=_WORKER),
        "lent": LocalCluster(options.checkpoint, worker_options={**_WORKER, "lend-threads": folder}),
    }
    pairs: dict[int, list[dict[str, Figures]]] = {number: [] for number in options.concurrency}
    with clusters["kept"] as kept, clusters["lent"] as lent:
        addresses = {"kept": kept.router_address, "lent": lent.router_address}
        for address in addresses.values():
            asyncio.run(_serve(address, 4, 4, random.Random(-1)))
        for number in range(options.rounds):
            for concurrency, found in pairs.items():
                names = ["kept", "lent"] if number % 2 else ["lent", "kept"]
                num_requests = max(3, 2 * concurrency if concurrency < 32 else concurrency)
                pair = {
                    name: asyncio.run(
                        _serve(addresses[name], concurrency, num_requests, random.Random(f"{number} {concurrency}"))
                    )
                    for name in names
                }
                found.append(pair)
                _log.info("round %d, %d at once, load %.1f: %s", number, concurrency, os.getloadavg()[0], pair)
    report = {"machine": machine(), "concurrency": {str(number): _summary(found) for number, found in pairs.items()}}
    _REPORT.parent.mkdir(parents=True, exist_ok=True)
    _REPORT.write_text(json.dumps(report, indent=1) + "\n")
    for number, found in pairs.items():
        for what, figures in _summary(found).items():
            _log.info("%2d at once, %-13s %9.1f kept %9.1f lent, ratio %s", number, what, *list(figures.values())[:3])


if __name__ == "__main__":
    _main()
