"""Workers that run the checkpoint's module: their pages have its layer, their tokens are others', and none mix."""

import asyncio
from pathlib import Path

import pytest
from headrace_client import Client
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import eventually

OPTIONS = {"dtype": "float32", "page-size": 16, "kv-pool-mib": 8, "max-step-tokens": 96}
# The demo model's four layers, and the module's.
LAYOUT = KvLayout(5, 16, CacheDtype.FLOAT32, LatentAttention(64, 32))
KINDS = [
    SamplingParams(temperature=0.0, max_tokens=64),
    SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=48),
    SamplingParams(temperature=0.8, seed=8, max_tokens=48, repetition_penalty=1.1, top_logprobs=3),
]
PROMPT = "Once upon a time there was a little fox named Zorvim." + " The fox lived in the forest with a bear." * 14


@pytest.fixture(scope="module")
def cluster(model_dir: Path):
    with LocalCluster(model_dir, worker_options=OPTIONS | {"speculate": "mtp:2"}) as cluster:
        yield cluster


def test_tokens_are_those_of_a_worker_that_guesses_nothing(cluster: LocalCluster, model_dir: Path):
    with (
        LocalCluster(model_dir, num_prefill=0, num_decode=0, num_both=1, worker_options=OPTIONS) as plain,
        Client(plain.router_address) as alone,
        Client(cluster.router_address) as guessing,
    ):
        # The second time the prompt's whole pages are in the prefix caches, with the module's rows.
        for params in (*KINDS, KINDS[0]):
            expected = alone.generate(PROMPT, params)
            found = guessing.generate(PROMPT, params, include_timings=True)
            assert found.token_ids == expected.token_ids
            assert found.timings.transfer_bytes == found.timings.num_transfer_pages * LAYOUT.page_bytes


def test_a_worker_without_the_module_is_refused_by_the_options_name(cluster: LocalCluster):
    cluster.decode_options, cluster.wait_for_workers = {"speculate": "off"}, False
    process = cluster.add_decode()
    with Client(cluster.router_address) as client:

        def detail() -> str:
            workers = client.server_info().workers
            return next((w.detail for w in workers if w.address == process.address and w.state == "refused"), "")

        asyncio.run(eventually(lambda: bool(detail()), "the router refuses the worker"))
        assert detail() == (
            "its cache layout differs from this fleet's: num_layers 4, not 5 (--speculate mtp has one more)"
        )
        assert client.generate(PROMPT, KINDS[0]).token_ids, "the others serve on"
