"""SIGKILL, SIGSTOP and SIGTERM of workers under load, and clients that leave: exact tokens, and every page free."""

import asyncio
import json
import signal
import urllib.request

import pytest
from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.errors import DeadlineError, UnavailableError
from headrace_core.request import FinishReason, Grammar, GrammarKind, SamplingParams
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.cluster_checks import all_pages_free, eventually

PROMPT = "Once upon a time there was a little fox named Zorvim."
AWAY_S = 4.0
"""Longer than a worker may say nothing, and shorter than a router may."""
OPTIONS = {"dtype": "float32", "page-size": 16, "kv-pool-mib": 8, "max-step-tokens": 96}


@pytest.fixture(scope="module")
def lasting(model_dir):
    with LocalCluster(model_dir, num_prefill=2, num_decode=2, worker_options=OPTIONS) as cluster:
        yield cluster


@pytest.fixture
def cluster(lasting):
    """Two pairs of workers: who was killed in a test before has a successor. To start all takes longer than a test."""
    running = {process.address for process in lasting.processes if process.poll() is None}
    for process in [*lasting.processes]:
        if process.address not in running:
            running.add(lasting.restart(process).address)
    return lasting


@pytest.fixture
def retries(cluster):
    """How many there were since the test began."""
    before = num_retries(cluster)
    return lambda: num_retries(cluster) - before


def requests(reference, count):
    words = reference.tokenize(PROMPT + " The fox lived in the forest with a bear." * 40)
    return [(words[: 20 + 9 * i], 48 + 2 * i) for i in range(count)]


class Load:
    """Requests side by side, each begun anew when it ends, until `settle`: what happens meanwhile happens amid them.

    Every answer must be the one in `want`, which `answers` gave before.
    """

    def __init__(self, client, requests, want, **sampling):
        self._client = client
        self._is_settling = False
        self._streaming = set()
        self._begun = asyncio.Event()
        self.tasks = [
            asyncio.create_task(self._repeat(number, *request, want[number], sampling))
            for number, request in enumerate(requests)
        ]

    async def begun(self):
        """Return when several streams are in their middle."""
        async with asyncio.timeout(WAIT_S):
            await self._begun.wait()

    async def settle(self):
        """Let every stream end, and one more of each request that began after this call."""
        self._is_settling = True
        await asyncio.gather(*self.tasks)

    async def _repeat(self, number, prompt, most, want, sampling):
        is_last = False
        while not is_last:
            is_last = self._is_settling
            token_ids = []
            async with self._client.stream(prompt, params(most, sampling)) as stream:
                async for delta in stream:
                    token_ids.extend(delta.token_ids)
                    self._streaming.add(number)
                    if len(self._streaming) >= 4:
                        self._begun.set()
            self._streaming.discard(number)
            assert token_ids == want, f"request {number}"


def params(most, sampling):
    return SamplingParams(**{"max_tokens": most, "ignore_eos": True, **sampling})


async def answers(client, requests, **sampling):
    """Return the tokens of every request, undisturbed."""
    results = await asyncio.gather(*(client.generate(prompt, params(most, sampling)) for prompt, most in requests))
    return [list(result.token_ids) for result in results]


def first(cluster, role):
    return next(process for process in cluster.processes if process.role == role and process.poll() is None)


async def runs_something(client, process):
    """Return when the router knows of sequences that `process` runs."""

    async def is_busy():
        workers = (await client.server_info()).workers
        return any(worker.address == process.address and worker.num_running for worker in workers)

    await eventually(is_busy, what=f"{process.name} runs something")


def num_retries(cluster):
    with urllib.request.urlopen(f"http://{cluster.router.metrics_address}/metrics", timeout=WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("headrace_retries_total"))


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 11}], ids=["greedy", "sampled"]
)
def test_kill_9_of_one_worker_costs_no_request_and_no_token(cluster, retries, reference, role, sampling):
    load = requests(reference, 12)

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            want = await answers(client, load, **sampling)
            disturbed = Load(client, load, want, **sampling)
            await disturbed.begun()
            victim = first(cluster, role)
            await runs_something(client, victim)
            victim.kill()
            await disturbed.settle()
            await all_pages_free(client.server_info)

    asyncio.run(main())
    assert role == "prefill" or retries() > 0, "the killed worker ran nothing"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_kill_9_of_one_worker_leaves_answers_held_to_their_grammar(cluster, retries, reference, role):
    load = requests(reference, 8)
    numbers = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 999},
        "minItems": 12,
        "maxItems": 16,
    }
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(numbers))
    sampling = {"temperature": 0.9, "seed": 7, "grammar": grammar, "ignore_eos": False, "max_tokens": 400}

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            results = await asyncio.gather(*(client.generate(prompt, params(most, sampling)) for prompt, most in load))
            for result in results:
                assert result.finish_reason is FinishReason.STOP
                assert 12 <= len(json.loads(result.text)) <= 16
            want = [list(result.token_ids) for result in results]
            disturbed = Load(client, load, want, **sampling)
            await disturbed.begun()
            victim = first(cluster, role)
            await runs_something(client, victim)
            victim.kill()
            await disturbed.settle()
            await all_pages_free(client.server_info)

    asyncio.run(main())
    assert role == "prefill" or retries() > 0, "the killed worker ran nothing"


def test_a_stopped_decode_worker_is_noticed_and_its_streams_go_on(cluster, retries, reference):
    load = requests(reference, 8)

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            want = await answers(client, load, temperature=0.0)
            disturbed = Load(client, load, want, temperature=0.0)
            await disturbed.begun()
            await runs_something(client, victim)
            victim.send_signal(signal.SIGSTOP)
            await disturbed.settle()
            await all_pages_free(client.server_info)

    victim = first(cluster, "decode")
    try:
        asyncio.run(main())
    finally:
        victim.kill()
        assert victim.wait(WAIT_S)
    assert retries() > 0, "the stopped worker ran nothing"


def test_a_router_that_was_stopped_blames_no_worker(cluster, retries, reference):
    load = requests(reference, 8)

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            want = await answers(client, load, temperature=0.0)
            disturbed = Load(client, load, want, temperature=0.0)
            await disturbed.begun()
            cluster.router.send_signal(signal.SIGSTOP)
            await asyncio.sleep(AWAY_S)
            cluster.router.send_signal(signal.SIGCONT)
            await disturbed.settle()
            await all_pages_free(client.server_info)

    asyncio.run(main())
    assert retries() == 0


def test_sigterm_drains_a_worker_without_losing_a_token(cluster, reference):
    load = requests(reference, 12)

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            want = await answers(client, load, temperature=0.0)
            disturbed = Load(client, load, want, temperature=0.0)
            await disturbed.begun()
            leaving = [first(cluster, role) for role in ("prefill", "decode")]
            for process in leaving:
                process.terminate()
            await disturbed.settle()
            for process in leaving:
                assert await asyncio.to_thread(process.wait, WAIT_S)
                assert process.poll() == 0
            await all_pages_free(client.server_info)

    asyncio.run(main())


def test_clients_that_leave_free_everything(cluster, reference):
    """Cancelled in every phase: queued, prefilling, transferring, decoding."""
    load = requests(reference, 24)

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            want = await answers(client, load, temperature=0.0)
            leaving, staying = (Load(client, load[i::2], want[i::2], temperature=0.0) for i in range(2))
            await leaving.begun()
            for task in leaving.tasks:
                task.cancel()
            await staying.settle()
            await all_pages_free(client.server_info)

            leaving = Load(client, load, want, temperature=0.0)
            await leaving.begun()
            await client.close()
            await asyncio.wait(leaving.tasks)
            for task in leaving.tasks:
                task.cancelled() or task.exception()  # seen
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
                    await client.generate(PROMPT, timeout_s=WAIT_S)
                await all_pages_free(client.server_info)

        asyncio.run(main())
