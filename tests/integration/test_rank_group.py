"""Workers of several ranks, as real processes: their tokens are those of one process, or of transformers."""

from __future__ import annotations

import asyncio
import shutil
import signal
import urllib.request
from pathlib import Path

import pytest
from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.cluster_checks import all_pages_free
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint

PROMPT = "Once upon a time there was a little fox named Zorvim."
OPTIONS = {"dtype": "float32", "page-size": 16, "kv-pool-mib": 8, "max-step-tokens": 96, "rank-timeout-s": 60}
"""The timeout is for a machine that tests load; no rank dies here."""


def metric(address: str, name: str, *labels: str) -> float:
    """Return the sum of a metric's samples that have `labels`, each as 'outcome="done"'."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.split()[-1]) for line in found if all(label in line for label in labels))


async def tokens_of(client: AsyncClient, requests: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    """Return the answers to requests that run side by side."""
    results = await asyncio.gather(
        *(client.generate(prompt, params, timeout_s=4 * WAIT_S) for prompt, params in requests)
    )
    return [list(result.token_ids) for result in results]


def test_a_decode_group_takes_and_generates_as_one_process(model_dir: Path, reference):
    """Experts by rank (EP), steps as two micro-batches. Prompts of 1 to 40 tokens, in a pool without room for all."""
    words = reference.tokenize(PROMPT + " The fox lived in the forest with a bear." * 20)
    requests = [(words[: 1 + 3 * i], SamplingParams(temperature=0.0, max_tokens=100)) for i in range(14)]
    want = [reference.greedy(prompt, 100) for prompt, _ in requests]
    options = {**OPTIONS, "page-size": 32, "kv-pool-mib": 1, "max-context-tokens": 320, "two-batch-rows": 2}

    async def main(cluster: LocalCluster) -> None:
        async with AsyncClient(cluster.router_address) as client:
            assert len((await client.server_info()).workers) == 2, "a group is one worker"
            for told in await tokens_of(client, requests), await tokens_of(client, requests):
                assert told == want
            await all_pages_free(client.server_info)

    with LocalCluster(model_dir, decode_ranks=2, worker_options=options) as cluster:
        asyncio.run(main(cluster))
        prefill, decode = cluster.workers
        assert metric(decode.metrics_address, "headrace_ranks") == 2
        assert metric(prefill.metrics_address, "headrace_ranks") == 1
        assert metric(prefill.metrics_address, "headrace_prefix_cache_hit_tokens_total") > 0
        assert metric(decode.metrics_address, "headrace_transfer_bytes_total") > 0
        ranks = cluster.ranks(decode)
        decode.terminate()  # rank 0 alone is told, and lets the other go
        assert all(rank.wait(WAIT_S) for rank in ranks)
        assert [rank.poll() for rank in ranks] == [0, 0]


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(temperature=0.8, top_p=0.95, seed=seed, max_tokens=40)


async def turns(cluster: LocalCluster) -> list[list[list[int]]]:
    """Return the answers to prompts, greedy and drawn, and to second turns, of which pages come back."""
    words = [(17 * i * i + 5 * i) % 1500 + 10 for i in range(150)]
    firsts = [(words[3 * i : 30 + 12 * i], sampled(i) if i % 2 else SamplingParams(temperature=0.0, max_tokens=40))
              for i in range(8)]  # fmt: skip
    async with AsyncClient(cluster.router_address) as client:
        first = await tokens_of(client, firsts)
        seconds = [
            ([*prompt, *told, *words[:40]], params) for (prompt, params), told in zip(firsts, first, strict=True)
        ]
        second = await tokens_of(client, seconds)
        await all_pages_free(client.server_info)
        return [first, second]


def turns_of_one_process(folder: Path, model_dir: Path, kind: str) -> list[list[list[int]]]:
    """Write a tiny checkpoint with the demo model's tokenizer to `folder`; return one worker's `turns`."""
    for file in model_dir.glob("token*"):
        folder.mkdir(exist_ok=True)
        shutil.copy(file, folder)
    write_checkpoint(folder, {**TINY_CONFIGS[kind], "vocab_size": 1536, "max_position_embeddings": 512})
    with LocalCluster(folder, num_prefill=0, num_decode=0, num_both=1, worker_options=OPTIONS) as alone:
        return asyncio.run(turns(alone))


@pytest.mark.parametrize("kind", ["v3", "mixtral"])
def test_groups_on_both_sides_answer_as_one_process_does_both(tmp_path: Path, model_dir: Path, kind: str):
    """Latents, which every rank has, and keys and values, of which each has its heads; a second turn comes back."""
    want = turns_of_one_process(tmp_path, model_dir, kind)
    with LocalCluster(tmp_path, prefill_ranks=2, decode_ranks=2, worker_options=OPTIONS) as cluster:
        assert asyncio.run(turns(cluster)) == want
        assert metric(cluster.workers[0].metrics_address, "headrace_prefix_fetched_tokens_total") > 0
        followers = [cluster.ranks(worker)[1] for worker in cluster.workers]
        for follower in followers:
            follower.send_signal(signal.SIGTERM)  # a follower is told, and all leave
        assert all(rank.wait(WAIT_S) for worker in cluster.workers for rank in cluster.ranks(worker))
        assert all(rank.poll() == 0 for worker in cluster.workers for rank in cluster.ranks(worker))


def test_tokens_in_fp8_are_those_of_a_process_that_sends_none(model_dir: Path):
    """One process computes prompts, a group generates and dispatches; both round what experts are given."""
    words = [(17 * i * i + 5 * i) % 1400 + 10 for i in range(60)]
    requests = [(words[i : 12 + 9 * i], SamplingParams(temperature=0.0, max_tokens=30)) for i in range(5)]

    async def told(cluster: LocalCluster) -> list[list[int]]:
        async with AsyncClient(cluster.router_address) as client:
            return await tokens_of(client, requests)

    fp8 = {**OPTIONS, "dispatch-dtype": "fp8_e4m3"}
    one = {"num_prefill": 0, "num_decode": 0, "num_both": 1}
    with LocalCluster(model_dir, **one, worker_options=OPTIONS) as cluster:
        plain = asyncio.run(told(cluster))
    with LocalCluster(model_dir, **one, worker_options=fp8) as cluster:
        want = asyncio.run(told(cluster))
    assert want != plain
    # Experts that may move are dispatched to, also where every rank has every token.
    with LocalCluster(model_dir, decode_ranks=2, worker_options={**fp8, "rebalance": "auto:3600"}) as cluster:
        assert asyncio.run(told(cluster)) == want
        sent = metric(cluster.workers[1].metrics_address, "headrace_transfer_bytes_total")
        assert sent > 0, "nothing was handed off"
