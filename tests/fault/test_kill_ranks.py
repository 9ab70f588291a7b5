"""One rank of a worker's group dies, hangs or loses its parent: the group ends, and every stream goes on elsewhere."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from headrace_client import AsyncClient
from headrace_client.cluster.cluster_process import ClusterProcess
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.cluster_checks import all_pages_free

from tests.fault.test_kill_workers import OPTIONS, Load, answers, num_retries, requests, runs_something

TIMEOUT_S = 20


@pytest.fixture
def two_batch_rows() -> int:
    return 0


@pytest.fixture
def cluster(model_dir: Path, two_batch_rows: int) -> Iterator[LocalCluster]:
    options = {**OPTIONS, "rank-timeout-s": TIMEOUT_S, "two-batch-rows": two_batch_rows}
    with LocalCluster(model_dir, num_decode=2, decode_ranks=2, worker_options=options) as cluster:
        yield cluster


def ended(processes: list[ClusterProcess]) -> list[int | None]:
    """Return the exit codes, when all have ended."""
    assert all(process.wait(WAIT_S) for process in processes), "a rank goes on without its group"
    return [process.poll() for process in processes]


@pytest.mark.parametrize(
    ("rank", "number", "codes", "two_batch_rows"),
    [
        (0, signal.SIGKILL, [-9, 1], 0),
        (1, signal.SIGKILL, [1, -9], 0),
        (0, signal.SIGSTOP, [None, 1], 0),
        (1, signal.SIGSTOP, [1, None], 0),
        (1, signal.SIGKILL, [1, -9], 2),
        (0, signal.SIGSTOP, [None, 1], 2),
    ],
    ids=[
        "leader killed",
        "follower killed",
        "leader stopped",
        "follower stopped",
        "follower killed among micro-batches",
        "leader stopped among micro-batches",
    ],
)
def test_a_rank_that_dies_or_hangs_ends_its_group_and_costs_no_token(cluster, reference, rank, number, codes):
    load = requests(reference, 8)
    victims = cluster.ranks(cluster.workers[1])

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            want = await answers(client, load, temperature=0.0)
            disturbed = Load(client, load, want, temperature=0.0)
            await disturbed.begun()
            await runs_something(client, victims[0])
            victims[rank].send_signal(number)
            await disturbed.settle()
            await all_pages_free(client.server_info)

    asyncio.run(main())
    assert num_retries(cluster) > 0, "the group ran nothing"
    survivor = victims[1 - rank]
    if codes[rank] is None:
        # What is stopped can't end; once it goes on it finds its group gone.
        assert ended([survivor]) == [1]
        victims[rank].send_signal(signal.SIGCONT)
        codes = [1, 1]
    assert ended(victims) == codes
    assert any("the group ends, see the other ranks' logs" in line for line in survivor.lines())
    assert all(process.poll() is None for process in cluster.ranks(cluster.workers[2]))


@pytest.mark.parametrize(("rank", "codes"), [(0, [-9, 1]), (1, [1, -9])], ids=["leader's lane", "other lane"])
def test_a_rank_killed_in_either_lane_costs_no_token_of_any(model_dir: Path, reference, rank, codes):
    """Two decode groups of two lanes each; the sequences of both lanes go on elsewhere."""
    load = requests(reference, 8)
    options = {**OPTIONS, "rank-timeout-s": TIMEOUT_S}

    async def main(cluster: LocalCluster) -> None:
        async with AsyncClient(cluster.router_address) as client:
            want = await answers(client, load, temperature=0.0)
            disturbed = Load(client, load, want, temperature=0.0)
            await disturbed.begun()
            await runs_something(client, victims[0])
            victims[rank].kill()
            await disturbed.settle()
            await all_pages_free(client.server_info)

    with LocalCluster(
        model_dir, num_decode=2, decode_ranks=2, worker_options=options, decode_options={"attention-tp": 1}
    ) as cluster:
        victims = cluster.ranks(cluster.workers[1])
        asyncio.run(main(cluster))
        assert num_retries(cluster) > 0, "the group ran nothing"
        assert ended(victims) == codes


def test_an_idle_group_notices_a_rank_that_is_gone_and_comes_back_as_another_worker(cluster, reference):
    load = requests(reference, 6)

    async def ask():
        async with AsyncClient(cluster.router_address) as client:
            told = await answers(client, load, temperature=0.0)
            await all_pages_free(client.server_info)
            return told

    want = asyncio.run(ask())
    group = cluster.ranks(cluster.workers[1])
    group[1].kill()
    assert ended(group) == [1, -9]
    successor = cluster.restart(group[0])
    # It alone: the other group leaves.
    cluster.workers[2].terminate()
    assert ended(cluster.ranks(cluster.workers[2])) == [0, 0]
    assert asyncio.run(ask()) == want
    assert [process.poll() for process in cluster.ranks(successor)] == [None, None]
