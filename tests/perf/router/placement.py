"""Which placement finds more in prefix caches: a trace against 2 prefill and 2 decode workers, policy by policy.

    python -m tests.perf.router.placement TRACE.jsonl --policies prefix-cache affinity round-robin

Each policy gets a cluster of its own, with cold caches, and the same requests: the trace's first 500 at 1/16 of their
length, by its own times or (`--concurrency`) by so many clients in its order. The prefill workers' pools together hold
a third of the trace's distinct tokens (`--pool-share`). The model is the demo's, told that its context is 8,192; with
`--paced` it is none, but steps of a pace (`paced_worker`), so that workers do not take each other's time. Writes
build/bench/placement.json with every request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace_client.bench.asked import Dataset
from headrace_client.bench.block import block
from headrace_client.bench.figures import figures_of
from headrace_client.bench.grpc_target import GrpcTarget
from headrace_client.bench.load import Arrivals, Load
from headrace_client.bench.prompts import Session
from headrace_client.bench.report import Run, encode_report
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_client.connection import ConnectionOptions
from headrace_core.families.config_json import parse_config
from headrace_core.kv.layout import CacheDtype
from headrace_core.request_trace import load_trace, prefix_hits
from headrace_router.placement.preferences import PREFERENCES

from tests.perf.machine import machine
from tests.perf.router.paced import Fleet

_REPORT = Path("build/bench/placement.json")
_CONTEXT = 8192
_PAGE_TOKENS = 32
"""A block of the trace at a sixteenth of its length."""


def computing(model: Path, policy: str, pool_tokens: int) -> LocalCluster:
    """Return workers that compute the demo model."""
    options = {"page-size": _PAGE_TOKENS, "threads": 1, "max-context-tokens": _CONTEXT, "roofline-every-steps": 0}
    config = parse_config(model)
    layout = config.kv_layout(_PAGE_TOKENS, CacheDtype(config.checkpoint_dtype))
    pool_mib = max(1, round(pool_tokens * layout.token_bytes / 2**20))
    return LocalCluster(
        model, 2, 2, worker_options=options, prefill_options={"kv-pool-mib": pool_mib},
        router_options={"placement": policy},
    )  # fmt: skip


def paced(policy: str, pool_tokens: int) -> LocalCluster:
    """Return workers of a pace."""
    fleet = Fleet(2, 2, pool_tokens=1 << 21, context=_CONTEXT, router_options={"placement": policy})
    return replace(fleet, prefill_pool_tokens=pool_tokens).cluster()


async def measure(cluster: LocalCluster, policy: str, sessions: list[Session], arrivals: Arrivals) -> Run:
    """Return what became of the trace's requests under one policy."""
    with cluster:
        target = GrpcTarget(cluster.router_address, ConnectionOptions(), model="", timeout_s=3600.0)
        load = Load(target, sessions, arrivals, vocab_size=256)
        watching = asyncio.create_task(_watch(policy, load))
        try:
            records = await load.run()
        finally:
            watching.cancel()
            await target.close()
    return Run({"placement": policy, "concurrency": arrivals.concurrency}, figures_of(records), records)


async def _watch(policy: str, load: Load) -> None:
    while True:
        await asyncio.sleep(20.0)
        sys.stderr.write(f"{policy}: {len(load.tally.records)} of {load.tally.num_requests}\n")


def main() -> None:
    """Measure each policy, print its block, write all."""
    parser = argparse.ArgumentParser(description="Measure what policies of placement find in prefix caches.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--policies", nargs="+", choices=list(PREFERENCES), default=["prefix-cache", "round-robin"])
    parser.add_argument("--num-requests", type=int, default=500)
    parser.add_argument("--length-scale", type=float, default=16.0)
    parser.add_argument("--time-scale", type=float, default=1.0)
    parser.add_argument("--concurrency", type=int, help="a closed loop of so many clients, in the trace's order")
    parser.add_argument(
        "--pool-share", type=float, default=1 / 3, help="of the distinct tokens, in both pools together"
    )
    parser.add_argument("--paced", action="store_true", help="workers of a pace in place of the demo model")
    parser.add_argument("--json", type=Path, default=_REPORT)
    options = parser.parse_args()
    workload = load_trace(options.trace).head(options.num_requests)
    distinct = (workload.num_prompt.sum() - prefix_hits(workload).sum()) / options.length_scale
    # No less than one prompt of the longest kind takes.
    pool_tokens = max(options.pool_share * distinct / 2, 1.1 * float(workload.num_prompt.max()) / options.length_scale)
    dataset = Dataset(
        "", options.trace, options.num_requests, time_scale=options.time_scale, length_scale=options.length_scale
    )
    sessions = dataset.sessions()
    if options.concurrency is not None:
        sessions = [replace(session, arrival_s=None) for session in sessions]
    about: dict[str, Any] = {
        "pool_tokens": pool_tokens,
        "is_paced": options.paced,
        "infinite_cache_hit_rate": _infinite(workload),
    }
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        model = _model(Path(folder) / "demo")
        for policy in options.policies:
            cluster = (
                paced(policy, round(pool_tokens)) if options.paced else computing(model, policy, round(pool_tokens))
            )
            runs.append(asyncio.run(measure(cluster, policy, sessions, Arrivals(None, 1.0, options.concurrency))))
            sys.stdout.write(f"{policy}, load average {os.getloadavg()[0]:.1f}\n{block(runs[-1].figures, {})}\n")
            report = {**encode_report(runs, command=" ".join(sys.argv), target="2 prefill, 2 decode"), **about}
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({**machine(), **report}) + "\n")


def _model(folder: Path) -> Path:
    shutil.copytree("demo/model", folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": _CONTEXT}))
    return folder


def _infinite(workload: Any) -> float:
    return float(prefix_hits(workload).sum() / workload.num_prompt.sum())


if __name__ == "__main__":
    main()
