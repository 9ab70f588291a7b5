"""Several routers over the same workers, that know nothing of each other, and a set of workers that changes in a burst.

Under load, with real processes: exact tokens, nobody blamed who did not fail, and every page free at the end.
"""

import asyncio

import pytest
from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.cluster_checks import all_pages_free, eventually

from tests.fault.test_kill_workers import OPTIONS, Load, answers, num_retries, requests, runs_something

FEW_PLACES = {"max-step-sequences": 6}
"""Of a worker: two routers that each see room for six ask for more than there is."""


@pytest.fixture
def cluster(model_dir):
    with LocalCluster(model_dir, num_prefill=2, num_decode=2, worker_options=OPTIONS | FEW_PLACES) as cluster:
        yield cluster


def second_router(cluster):
    """Start another router over the cluster's workers; return it when it has them all."""
    process = cluster._spawn("router", {"workers-file": cluster._path("workers")})
    cluster._wait_ready([process])
    cluster._wait_registered()
    return process


def started(cluster):
    """Start another decode worker that no router knows of; return it when it serves."""
    process = cluster._spawn("decode")
    cluster._wait_ready([process])
    return process


async def states(client):
    return {worker.address: worker.state for worker in (await client.server_info()).workers}


async def circuits(client):
    return {worker.circuit for worker in (await client.server_info()).workers}


def test_two_routers_share_workers_and_one_that_is_killed_takes_nothing_of_the_other_s(cluster, reference):
    load = requests(reference, 10)
    first = cluster.router
    second = second_router(cluster)

    async def main():
        async with AsyncClient(first.address) as one, AsyncClient(second.address) as two:
            want = await answers(one, load, temperature=0.0)
            stays, goes = (Load(client, load, want, temperature=0.0) for client in (one, two))
            await asyncio.gather(stays.begun(), goes.begun())
            second.kill()
            ends = await asyncio.gather(*goes.tasks, return_exceptions=True)
            assert all(isinstance(end, Exception) and not isinstance(end, AssertionError) for end in ends)
            await stays.settle()
            await all_pages_free(one.server_info)
            assert await circuits(one) == {"closed"}, "another router's end is no worker's failure"

    asyncio.run(main())


def test_two_routers_that_promise_the_same_room_lose_nothing(cluster, reference):
    """Each sees what the other started only with the next report: what was promised twice waits at the worker."""
    load = requests(reference, 16)
    first = cluster.router
    second = second_router(cluster)

    async def main():
        async with AsyncClient(first.address) as one, AsyncClient(second.address) as two:
            want = await answers(one, load, temperature=0.0)
            loads = [Load(client, load, want, temperature=0.0) for client in (one, two)]
            await asyncio.gather(*(each.begun() for each in loads))
            await asyncio.gather(*(each.settle() for each in loads))
            await all_pages_free(one.server_info)
            assert await circuits(one) == await circuits(two) == {"closed"}

    asyncio.run(main())


def test_workers_that_come_and_go_in_a_burst_cost_no_token_and_no_attempt(cluster, reference):
    load = requests(reference, 12)

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            want = await answers(client, load, temperature=0.0)
            burst = Load(client, load, want, temperature=0.0)
            await burst.begun()
            gone = next(process for process in cluster.workers if process.role == "decode")
            await runs_something(client, gone)
            left = [address for address in cluster._registered if address != gone.address]
            cluster._write_workers(left)

            async def is_left():
                return gone.address not in await states(client)

            await eventually(is_left, what="a worker that is no longer listed is left when its last sequence ended")
            came = await asyncio.to_thread(started, cluster)
            cluster._write_workers([*left, came.address])
            await runs_something(client, came)
            cluster._write_workers([*left, came.address, gone.address])

            async def is_back():
                return (await states(client)).get(gone.address) == "ready"

            await eventually(is_back, what="a worker that is listed again is taken again")
            await burst.settle()
            await all_pages_free(client.server_info)
            assert await circuits(client) == {"closed"}
        assert gone.poll() is None, "nobody ended it"
        assert await asyncio.to_thread(lambda: gone.terminate() or gone.wait(WAIT_S))

    asyncio.run(main())
    assert num_retries(cluster) == 0, "who was no longer listed finished what it had"
