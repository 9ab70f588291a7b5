"""Decode workers that draft: the tokens are transformers', also when one is killed amid its streams."""

import asyncio
import urllib.request

import pytest
from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.cluster_checks import all_pages_free, eventually

PROMPT = "Once upon a time there was a little fox named Zorvim."
OPTIONS = {"dtype": "float32", "page-size": 16, "kv-pool-mib": 8, "max-step-tokens": 96}


def cluster_of(model_dir, kind):
    """Prompts' pages have the module's rows, too, where it guesses: all workers of a fleet have it."""
    options = {
        "lookup:4": {"worker_options": OPTIONS, "decode_options": {"speculate": kind}},
        "mtp": {"worker_options": OPTIONS | {"speculate": kind}},
    }[kind]
    return LocalCluster(model_dir, num_prefill=1, num_decode=2, **options)


def drafted(process, outcome):
    with urllib.request.urlopen(f"http://{process.metrics_address}/metrics", timeout=WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith("headrace_draft_tokens_total") and f'"{outcome}"' in line]
    return sum(float(line.split()[-1]) for line in found)


@pytest.mark.parametrize("kind", ["lookup:4", "mtp"])
def test_greedy_streams_are_transformers_and_go_on_when_a_worker_is_killed(kind, model_dir, reference):
    words = reference.tokenize((PROMPT + " The fox lived in the forest with a bear. ") * 6)
    # On a CPU the module guesses for a sequence that runs alone.
    requests = [words[: 60 + 9 * i] for i in range(1 if kind == "mtp" else 6)]
    params = SamplingParams(temperature=0.0, max_tokens=200)

    async def main(cluster):
        async with AsyncClient(cluster.router_address) as client:
            generating = asyncio.gather(*(client.generate(p, params, timeout_s=4 * WAIT_S) for p in requests))
            victims = [process for process in cluster.workers if process.role == "decode"]

            async def drafting():
                return next((process for process in victims if drafted(process, "accepted") > 0), None)

            killed = await eventually(drafting, what="guesses are right")
            killed.kill()
            results = await generating
            for prompt, result in zip(requests, results, strict=True):
                assert list(result.token_ids) == reference.greedy(prompt, 200)
            await all_pages_free(client.server_info)
            other = next(process for process in victims if process is not killed)
            return drafted(other, "accepted"), drafted(other, "rejected")

    with cluster_of(model_dir, kind) as cluster:
        accepted, rejected = asyncio.run(main(cluster))
    if kind == "mtp":
        # The module's rows of what was generated elsewhere came with a prefill worker's pages, or were computed again.
        assert accepted > 0.4 * (accepted + rejected)
