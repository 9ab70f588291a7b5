"""SIGKILL, SIGSTOP and SIGTERM of workers under load, and clients that leave: exact tokens, and every page free."""

import asyncio
import signal

import pytest
from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.errors import DeadlineError, UnavailableError
from headrace_core.request import SamplingParams
from headrace_core.testing.cluster_checks import all_pages_free

PROMPT = "Once upon a time there was a little fox named Zorvim."
OPTIONS = {"dtype": "float32", "page-size": 16, "kv-pool-mib": 8, "max-step-tokens": 96}


@pytest.fixture
def cluster(model_dir):
    with LocalCluster(model_dir, num_prefill=2, num_decode=2, worker_options=OPTIONS) as cluster:
        yield cluster


def requests(reference, count):
    words = reference.tokenize(PROMPT + " The fox lived in the forest with a bear." * 40)
    return [(words[: 20 + 9 * i], 48 + 2 * i) for i in range(count)]


class Load:
    """Requests at once; `begun` when some of them have tokens, while all of them still go on."""

    def __init__(self, client, requests, **sampling):
        self._client = client
        self._num_begun = 0
        self._begun = asyncio.Event()
        self.tasks = [
            asyncio.create_task(self._run(prompt, SamplingParams(max_tokens=most, ignore_eos=True, **sampling)))
            for prompt, most in requests
        ]

    async def _run(self, prompt, params):
        token_ids = []
        async with self._client.stream(prompt, params, timeout_s=100) as stream:
            async for delta in stream:
                if not token_ids:
                    self._num_begun += 1
                token_ids.extend(delta.token_ids)
                if self._num_begun >= 4:
                    self._begun.set()
        return token_ids

    async def begun(self):
        async with asyncio.timeout(60):
            await self._begun.wait()
        assert not any(task.done() for task in self.tasks), "nothing was left to disturb"

    async def results(self):
        return await asyncio.gather(*self.tasks)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 11}], ids=["greedy", "sampled"]
)
def test_kill_9_of_one_worker_costs_no_request_and_no_token(cluster, reference, role, sampling):
    load = requests(reference, 16)

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            want = await Load(client, load, **sampling).results()
            disturbed = Load(client, load, **sampling)
            await disturbed.begun()
            next(process for process in cluster.processes if process.role == role).kill()
            assert await disturbed.results() == want
            await all_pages_free(client.server_info)

    asyncio.run(main())


def test_a_stopped_decode_worker_is_noticed_and_its_streams_go_on(cluster, reference):
    load = requests(reference, 8)

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            want = await Load(client, load, temperature=0.0).results()
            disturbed = Load(client, load, temperature=0.0)
            await disturbed.begun()
            next(process for process in cluster.processes if process.role == "decode").send_signal(signal.SIGSTOP)
            assert await disturbed.results() == want
            await all_pages_free(client.server_info)

    asyncio.run(main())


def test_sigterm_drains_a_worker_without_losing_a_token(cluster, reference):
    load = requests(reference, 16)

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            want = await Load(client, load, temperature=0.0).results()
            disturbed = Load(client, load, temperature=0.0)
            await disturbed.begun()
            leaving = [
                next(process for process in cluster.processes if process.role == role) for role in ("prefill", "decode")
            ]
            for process in leaving:
                process.terminate()
            assert await disturbed.results() == want
            for process in leaving:
                assert await asyncio.to_thread(process.wait, 30)
                assert process.poll() == 0
            await all_pages_free(client.server_info)

    asyncio.run(main())


def test_clients_that_leave_free_everything(cluster, reference):
    """Cancelled in every phase: queued, prefilling, transferring, decoding."""
    load = requests(reference, 24)

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            disturbed = Load(client, load, temperature=0.0)
            await disturbed.begun()
            for task in disturbed.tasks[::2]:
                task.cancel()
            kept = await asyncio.gather(*disturbed.tasks[1::2])
            assert [len(token_ids) for token_ids in kept] == [most for _, most in load[1::2]]
            await all_pages_free(client.server_info)

            disturbed = Load(client, load, temperature=0.0)
            await disturbed.begun()
            await client.close()
            await asyncio.gather(*disturbed.tasks, return_exceptions=True)
        async with AsyncClient(cluster.router_address) as client:
            await all_pages_free(client.server_info)

    asyncio.run(main())


def test_a_deadline_frees_everything(cluster, reference):
    prompt = reference.tokenize(PROMPT)

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            params = SamplingParams(max_tokens=3000, ignore_eos=True)
            with pytest.raises(DeadlineError):
                await client.generate(prompt, params, timeout_s=1.0)
            await all_pages_free(client.server_info)

    asyncio.run(main())


def test_without_workers_the_error_says_what_is_missing(model_dir):
    options = {"no-workers-timeout-s": 1.0}
    with LocalCluster(
        model_dir, num_prefill=1, num_decode=1, router_options=options, worker_options=OPTIONS
    ) as cluster:
        for process in cluster.processes:
            if process.role == "decode":
                process.kill()

        async def main():
            async with AsyncClient(cluster.router_address) as client:
                with pytest.raises(UnavailableError, match="decode"):
                    await client.generate(PROMPT, timeout_s=60)
                await all_pages_free(client.server_info)

        asyncio.run(main())
