"""Prefill workers with small pools, as is normal: streams outgrow them, and lose their decode worker then."""

import asyncio
import signal

import pytest
from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.errors import OverloadedError
from headrace_core.request import SamplingParams
from headrace_core.testing.cluster_checks import all_pages_free

OPTIONS = {"dtype": "float32", "page-size": 16, "max-step-tokens": 96}
MOST_PROMPT = 672
"""Tokens that a pool of 1 MiB holds."""


@pytest.fixture
def cluster(model_dir):
    pools = {"prefill_options": {"kv-pool-mib": 1}, "decode_options": {"kv-pool-mib": 8}}
    with LocalCluster(model_dir, num_prefill=1, num_decode=2, worker_options=OPTIONS, **pools) as cluster:
        yield cluster


def test_a_stream_that_outgrew_the_prefill_pool_survives_its_decode_worker_and_holds_up_nobody(cluster, reference):
    words = reference.tokenize("Once upon a time there was a little fox named Zorvim. " * 60)
    params = SamplingParams(max_tokens=120, temperature=0.8, seed=5, ignore_eos=True)

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            want = (await client.generate(words[: MOST_PROMPT - 40], params)).token_ids
            token_ids, victim = [], None
            async with client.stream(words[: MOST_PROMPT - 40], params) as stream:
                async for delta in stream:
                    token_ids.extend(delta.token_ids)
                    if len(token_ids) > 60 and victim is None:
                        victim = await _busy(client, cluster)
                        victim.send_signal(signal.SIGKILL)
                        with pytest.raises(OverloadedError, match=f"holds {MOST_PROMPT};"):
                            await client.generate(words[: MOST_PROMPT + 1], params)
                        await client.generate(words[:20], SamplingParams(max_tokens=4))
            assert tuple(token_ids) == want
            assert len(set(token_ids)) >= 16
            await all_pages_free(client.server_info)

    asyncio.run(main())


async def _busy(client, cluster):
    """Return the process that runs the only stream."""
    (address,) = [worker.address for worker in (await client.server_info()).workers if worker.num_running]
    return next(process for process in cluster.workers if process.address == address)
