"""What a group of ranks can be asked for, all at once: the tokens are still those of one process."""

from __future__ import annotations

import asyncio
from pathlib import Path

from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.request import SamplingParams
from headrace_core.testing.cluster_checks import all_pages_free

from tests.integration.test_rank_group import OPTIONS, PROMPT, metric, tokens_of

TOGETHER = {
    **OPTIONS,
    "page-size": 32,
    "kv-pool-mib": 1,
    "max-context-tokens": 320,
    "attention-tp": 1,
    "rebalance": "auto:1",
    "redundant-experts": 4,
}


def test_lanes_moving_experts_micro_batches_and_drafts_change_no_token(model_dir: Path, reference):
    """Two lanes on both sides, in pools without room for all; experts move while answers are under way."""
    words = reference.tokenize(PROMPT + " The fox lived in the forest with a bear." * 20)
    prompts = [words[: 1 + 3 * i] for i in range(14)]
    want = [reference.greedy(prompt, 100) for prompt in prompts]
    requests = [(prompt, SamplingParams(temperature=0.0, max_tokens=100)) for prompt in prompts]
    only_decode = {"two-batch-rows": 2, "speculate": "lookup:4"}

    async def main(cluster: LocalCluster) -> None:
        async with AsyncClient(cluster.router_address) as client:
            moved = 0.0
            while not moved:
                assert await tokens_of(client, requests) == want
                moved = metric(cluster.workers[1].metrics_address, "headrace_rebalances_total", 'outcome="done"')
            assert await tokens_of(client, requests) == want
            await all_pages_free(client.server_info)

    with LocalCluster(
        model_dir,
        prefill_ranks=2,
        decode_ranks=2,
        worker_options=TOGETHER,
        decode_options=only_decode,
    ) as cluster:
        asyncio.run(main(cluster))
        decode = cluster.workers[1]
        assert metric(decode.metrics_address, "headrace_ranks") == 2
