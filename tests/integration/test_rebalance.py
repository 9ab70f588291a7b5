"""A decode group that moves its experts while it serves: no request notices, and rank 0's page says what it did."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_client.commands.app import app
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.cluster_checks import eventually
from typer.testing import CliRunner

from tests.fault.test_kill_workers import Load, requests
from tests.integration.test_rank_group import OPTIONS, metric

TOGETHER = {"attention-tp": 1, "two-batch-rows": 2, "speculate": "lookup:4"}
"""What else a group can be asked for: a lane a rank, micro-batches, drafts."""


@pytest.mark.parametrize("more", [{}, TOGETHER], ids=["alone", "with-lanes-micro-batches-and-drafts"])
def test_experts_move_under_load_and_every_token_is_transformers(model_dir: Path, reference, more):
    load = requests(reference, 6)
    want = [reference.greedy(prompt, most) for prompt, most in load]

    async def main(cluster: LocalCluster) -> None:
        decode = cluster.workers[1]

        async def moved() -> bool:
            address = decode.metrics_address
            return await asyncio.to_thread(metric, address, "headrace_rebalances_total", 'outcome="done"') > 0

        async with AsyncClient(cluster.router_address) as client:
            running = Load(client, load, want, temperature=0.0)
            await running.begun()
            await eventually(moved, what="experts moved while streams were running", timeout_s=4 * WAIT_S)
            await running.settle()
        for name in ("headrace_moved_experts_total", "headrace_moved_expert_bytes_total",
                     "headrace_rebalance_seconds_total", "headrace_expert_rank_tokens"):  # fmt: skip
            assert metric(decode.metrics_address, name) > 0, name
        for rank in ("0", "1"):
            labels = (f'rank="{rank}"', 'part="compute"')
            assert metric(decode.metrics_address, "headrace_rank_seconds_total", *labels) > 0
        assert 0 <= metric(decode.metrics_address, "headrace_expert_imbalance_loss") < 1

    options = {**OPTIONS, "rebalance": "auto:1", "redundant-experts": 2}
    with LocalCluster(model_dir, decode_ranks=2, worker_options=options, decode_options=more) as cluster:
        asyncio.run(main(cluster))
        decode = cluster.workers[1].address
        asked = ["experts", "--server", cluster.router_address, "--worker", decode, "--json"]
        told = json.loads(CliRunner().invoke(app, asked).stdout)
        assert (told["worker"], told["ranks"], told["slots"], told["is_measured"]) == (decode, 2, 10, True)
        assert all(0 <= told[name]["loss"] < 1 for name in ("now", "rebalanced"))
        assert [len(rank) for rank in told["step_s"]["now"]] == [3, 3]
        assert told["moved_experts"] > 0
        assert any("experts moved" in line for line in cluster.workers[1].lines())
