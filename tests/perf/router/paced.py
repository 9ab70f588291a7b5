"""A router before paced workers, and what its clients saw of a trace: what the scripts about placement share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from headrace_client.bench.goodput import Goodput
from headrace_client.bench.grpc_target import GrpcTarget
from headrace_client.bench.load import Arrivals, Load
from headrace_client.bench.prompts import Part, Session, Turn
from headrace_client.bench.record import Record
from headrace_client.cluster.local_cluster import LocalCluster, Options, no_options
from headrace_client.connection import ConnectionOptions
from headrace_core.request_trace import Workload
from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.simulator import simulate
from headrace_planner.step_times import LinearStepTimes

from tests.perf.router.paced_worker import Pace

MODEL = Path("demo/model")
"""Its tokenizer and its context; nothing of it computes."""
PAGE_TOKENS = 32
_ROOT = Path(__file__).parents[3]
_VOCAB = 256
PACE = Pace(0.02, 4e-4, 2e-4)
"""20 ms a step, 0.4 ms a sequence in it, 0.2 ms a prompt token: so that four workers leave two cores room."""


@dataclass(frozen=True)
class Fleet:
    """Paced workers."""

    num_prefill: int
    num_decode: int = 0
    num_both: int = 0
    pace: Pace = PACE
    pool_tokens: int = 1 << 16
    prefill_pool_tokens: int = 1 << 16
    step_tokens: int = 1024
    """Of prefill workers; the others' steps take a quarter of as many prompt tokens, for answers wait for them."""
    slots: int = 16
    context: int = 4096
    router_options: Options = field(default_factory=no_options)

    def __str__(self) -> str:
        kinds = (("prefill", self.num_prefill), ("decode", self.num_decode), ("both", self.num_both))
        return " + ".join(f"{count} {name}" for name, count in kinds if count)

    def cluster(self) -> LocalCluster:
        """Return it, not started."""
        pace = f"{self.pace.fixed_s},{self.pace.row_s},{self.pace.prompt_token_s}"
        own = ("-m", "tests.perf.router.paced_worker", "--pace", pace, "--pool-tokens")
        taker = (*own, str(self.pool_tokens), "decode")
        return LocalCluster(
            MODEL,
            self.num_prefill,
            self.num_decode,
            self.num_both,
            worker_options={
                "page-size": PAGE_TOKENS, "threads": 1, "transport": "grpc", "max-step-sequences": self.slots,
                "roofline-every-steps": 0, "log-level": "WARNING", "max-context-tokens": self.context,
            },
            prefill_options={"max-step-tokens": self.step_tokens},
            decode_options={"max-step-tokens": self.step_tokens // 4},
            router_options=self.router_options,
            programs={
                "router": ("-m", "headrace_router"),
                "prefill": (*own, str(self.prefill_pool_tokens), "prefill"),
                "decode": taker,
                "both": taker,
            },
            env={"PYTHONPATH": str(_ROOT)},
        )  # fmt: skip

    def config(self, wire: Wire) -> SimConfig:
        """Return the same for the simulator."""
        pace = self.pace
        spec = WorkerSpec(
            LinearStepTimes(fixed_s=pace.fixed_s, row_s=pace.row_s, prompt_token_s=pace.prompt_token_s),
            max(1, self.prefill_pool_tokens // PAGE_TOKENS),
            PAGE_TOKENS,
            self.step_tokens,
            self.slots,
        )
        num_pages = max(1, self.pool_tokens // PAGE_TOKENS)
        other = replace(spec, num_pages=num_pages, max_step_tokens=self.step_tokens // 4)
        predicts = bool(self.router_options.get("predict-local", False))
        placement = str(self.router_options.get("placement", "prefix-cache"))
        return SimConfig(
            spec, other, other, self.num_prefill, self.num_decode, self.num_both, wire=wire, fidelity="exact",
            predicts_local=predicts, placement=placement,
        )  # fmt: skip


def sessions_of(workload: Workload) -> list[Session]:
    """Return a workload without shared beginnings as what is asked."""
    lengths = zip(workload.arrival_s.tolist(), workload.num_prompt.tolist(), workload.num_output.tolist(), strict=True)
    return [
        Session([Turn([Part((index,), num_prompt)], num_output)], arrival_s)
        for index, (arrival_s, num_prompt, num_output) in enumerate(lengths)
    ]


def ask(fleet: Fleet, sessions: Sequence[Session], arrivals: Arrivals | None = None) -> list[Record]:
    """Start the fleet, ask everything, and return what became of it."""

    async def run(address: str) -> list[Record]:
        target = GrpcTarget(address, ConnectionOptions(), model="", timeout_s=3600.0)
        try:
            return await Load(target, sessions, arrivals or Arrivals(), vocab_size=_VOCAB).run()
        finally:
            await target.close()

    with fleet.cluster() as cluster:
        return asyncio.run(run(cluster.router_address))


def seen(records: Sequence[Record], goodput: Goodput) -> dict[str, Any]:
    """Return the share of requests that met the objectives, and percentiles, ms."""
    answered = [record for record in records if record.is_ok]
    ttft = [1e3 * record.ttft_s for record in answered]
    tpot = [1e3 * each for record in answered if (each := record.tpot_s) is not None]
    gaps = [1e3 * gap for record in answered for gap in record.itls_s()]
    return {
        "num_requests": len(records),
        "num_failed": len(records) - len(answered),
        "met": sum(map(goodput.is_met_by, answered)) / len(records),
        **_percentiles("ttft", ttft),
        **_percentiles("tpot", tpot),
        **_percentiles("itl", gaps),
    }


def simulated(fleet: Fleet, workload: Workload, goodput: Goodput, wire: Wire) -> dict[str, Any]:
    """Return the same of a simulation; objectives are TTFT's and TPOT's."""
    result = simulate(fleet.config(wire), workload)
    ttft_s, tpot_s = result.ttft_s, np.nan_to_num(result.tpot_s)
    limits = goodput.limits_s
    met = (ttft_s <= limits.get("ttft", np.inf)) & (tpot_s <= limits.get("tpot", np.inf))
    return {
        "num_requests": len(workload),
        "met": float(met.mean()),
        **_percentiles("ttft", (1e3 * ttft_s).tolist()),
        **_percentiles("tpot", (1e3 * result.tpot_s[workload.num_output > 1]).tolist()),
        **{f"itl_p{p}": 1e3 * result.itl_percentile(p) for p in (50, 99)},
    }


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p{percent}": float(np.nanpercentile(values, percent)) for percent in (50, 99)}
