"""Serves the four workloads with a router and two workers as processes, asked over HTTP by `headrace bench` itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.roofline.model_shape import ModelShape
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from headrace_planner.sim_workloads import AT_ONCE, SLO, SPREAD, WORKLOADS
from headrace_router.testing import write_tokenizer

from tests.perf.machine import machine

SCALE = 8
"""Prompts and answers are so many times shorter than the workload's."""
_NUM_REQUESTS = {"conversation": 1024, AT_ONCE: 4096, "reasoning": 64, "summarization": 256}
_CLIENTS = 8
_MOST_TOKENS = 1024
_FOLDER = Path("build/bench/workloads")
_MIXTRAL = {
    **TINY_CONFIGS["mixtral"],
    "vocab_size": 1536, "hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_local_experts": 8, "max_position_embeddings": _MOST_TOKENS,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model that is small enough to be served here."""

    name: str
    folder: Path

    def prepare(self) -> None:
        """Write its checkpoint unless it is there."""
        if not (self.folder / "config.json").is_file():
            write_checkpoint(self.folder, _MIXTRAL)
            write_tokenizer(self.folder)


FAMILIES = {
    "v3": Family("demo model (V3)", Path("demo/model")),
    "mixtral": Family("small Mixtral", Path("build/checkpoint-small-mixtral")),
}


def serve(family: Family) -> list[dict[str, Any]]:
    """Return what a bench says of each workload, served by a prefill and a decode worker.

    Raises:
        RuntimeError: a request failed, or was answered with fewer tokens than asked for.
    """
    family.prepare()
    workers = {"max-context-tokens": _MOST_TOKENS, "max-step-sequences": 288, "kv-pool-mib": 512}
    # All requests at once are more than a router takes unless told; one client may have half of those open.
    router = {"http-listen": "127.0.0.1:0", "max-queued-requests": 8192, "max-open-requests": 16384}
    with LocalCluster(family.folder, worker_options=workers, router_options=router) as cluster:
        return [_cell(family, name, f"http://{cluster.router.http_address}") for name in WORKLOADS]


def _cell(family: Family, workload: str, url: str) -> dict[str, Any]:
    _FOLDER.mkdir(parents=True, exist_ok=True)
    path = _FOLDER / f"{family.folder.name}-{workload}.json"
    words = ["--base-url", url, "--dataset", workload, "--length-scale", str(SCALE), "--range-ratio", str(SPREAD)]
    words += ["--num-requests", str(_NUM_REQUESTS[workload]), "--warm-up", str(_CLIENTS)]
    words += ["--vocab-size", str(ModelShape.load(family.folder).vocab_size)]
    words += ["--goodput", f"ttft:{1e3 * SLO.ttft_s:g},tpot:{1e3 * SLO.itl_s:g}", "--json", str(path)]
    if workload != AT_ONCE:
        words += ["--concurrency", str(_CLIENTS)]
    load = os.getloadavg()[0]
    subprocess.run([sys.executable, "-m", "headrace_client", "bench", *words], check=True)
    (run,) = json.loads(path.read_text())["runs"]
    figures = run["figures"]
    if figures["failed"] or figures["short"]:
        raise RuntimeError(f"{family.name}, {workload}: {figures['errors']}, {figures['short']} answers were too short")
    return {
        "model": family.name,
        "workload": workload,
        "scale": SCALE,
        "clients": run["setting"]["concurrency"],
        "command": " ".join(["headrace bench", *words]),
        "figures": figures,
        "raw": str(path),
        "machine": {**machine(), "load_average": load, "is_real_time": os.sched_getscheduler(0) != os.SCHED_OTHER},
    }
