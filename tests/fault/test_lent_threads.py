"""Workers that lend each other threads: the same tokens while one is killed, and nothing of it stays but who lives."""

from __future__ import annotations

import asyncio
import os

import pytest
from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.testing.cluster_checks import all_pages_free, eventually
from headrace_kernels.backend import what_is_missing

from tests.fault.test_kill_workers import OPTIONS, Load, answers, first, params, requests, runs_something


@pytest.mark.skipif(what_is_missing("cpu") is not None, reason="threads are lent with compiled kernels alone")
def test_a_killed_worker_costs_no_token_and_its_threads_are_nobodys(model_dir, reference, tmp_path):
    folder = tmp_path / "lent"
    options = {**OPTIONS, "threads": 1, "lend-threads": folder}
    load = requests(reference, 6)

    async def main(cluster: LocalCluster) -> None:
        async with AsyncClient(cluster.router_address) as client:
            want = await answers(client, load, temperature=0.9, seed=11)
            assert len(os.listdir(folder)) == 3
            disturbed = Load(client, load, want, temperature=0.9, seed=11)
            await disturbed.begun()
            victim = first(cluster, "decode")
            await runs_something(client, victim)
            victim.kill()
            await disturbed.settle()
            await all_pages_free(client.server_info)

            async def is_forgotten() -> bool:
                await client.generate(load[0][0], params(2, {}))
                return len(os.listdir(folder)) == 2

            await eventually(is_forgotten, what="those that compute removed its file")

    with LocalCluster(model_dir, num_prefill=1, num_decode=2, worker_options=options) as cluster:
        asyncio.run(main(cluster))
    assert os.listdir(folder) == [], "who stops takes its file along"
