"""What goes wrong while a group moves its experts: a rank dies, or its checkpoint is not what it was."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from headrace_client import AsyncClient
from headrace_client.cluster.cluster_process import ClusterProcess
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.cluster_checks import all_pages_free, eventually

from tests.fault.test_kill_workers import OPTIONS, Load, answers, num_retries, requests
from tests.integration.test_rank_group import metric

MOVING = {**OPTIONS, "rank-timeout-s": 60, "rebalance": "auto:1", "redundant-experts": 2}
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the demo model whose weights a test may spoil."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.fixture
def groups(folder: Path) -> Iterator[LocalCluster]:
    with LocalCluster(folder, num_decode=2, decode_ranks=2, worker_options=MOVING) as cluster:
        yield cluster


def says(process: ClusterProcess, what: str) -> bool:
    return any(what in line for line in process.lines())


@pytest.mark.parametrize("rank", [0, 1], ids=["leader", "follower"])
def test_a_rank_killed_in_the_middle_of_a_move_costs_no_token(groups, folder, reference, rank):
    load = requests(reference, 8)
    victims = groups.ranks(groups.workers[1])

    async def has_begun() -> bool:
        return says(victims[0], "experts move")

    async def main():
        async with AsyncClient(groups.router_address) as client:
            want = await answers(client, load, temperature=0.0)
            # What opens a pipe waits until somebody writes to it: a move that began is in its middle from then on.
            (folder / WEIGHTS).unlink()
            os.mkfifo(folder / WEIGHTS)
            disturbed = Load(client, load, want, temperature=0.0)
            await disturbed.begun()
            await eventually(has_begun, what="a move", timeout_s=4 * WAIT_S)
            victims[rank].send_signal(signal.SIGKILL)
            await disturbed.settle()
            await all_pages_free(client.server_info)

    asyncio.run(main())
    assert not says(victims[0], "experts moved")
    assert num_retries(groups) > 0
    assert all(process.wait(WAIT_S) for process in victims)
    assert all(process.poll() is None for process in groups.ranks(groups.workers[2]))


def test_weights_that_are_not_what_was_loaded_leave_experts_where_they_are(folder, reference):
    load = requests(reference, 6)
    want = [reference.greedy(prompt, most) for prompt, most in load]

    async def main(cluster: LocalCluster) -> None:
        decode = cluster.workers[1]

        async def failed() -> bool:
            address = decode.metrics_address
            return await asyncio.to_thread(metric, address, "headrace_rebalances_total", 'outcome="failed"') > 0

        weights = folder / WEIGHTS
        data = bytearray(weights.read_bytes())
        data[len(data) // 4 :] = bytes(byte ^ 0x01 for byte in data[len(data) // 4 :])
        weights.write_bytes(data)
        async with AsyncClient(cluster.router_address) as client:
            running = Load(client, load, want, temperature=0.0)
            await running.begun()
            await eventually(failed, what="a rank that can't load", timeout_s=4 * WAIT_S)
            await running.settle()

    with LocalCluster(folder, decode_ranks=2, worker_options=MOVING) as cluster:
        asyncio.run(main(cluster))
        leader = cluster.workers[1]
        assert says(leader, "experts stay where they were")
        assert says(leader, "is not what was loaded of it before")
        assert metric(leader.metrics_address, "headrace_moved_experts_total") == 0
