"""Latents in 8 bits through real processes: the same tokens on one worker and on two, and no mixture of caches."""

import asyncio
from pathlib import Path

import pytest
from headrace_client import Client
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import eventually

OPTIONS = {
    "dtype": "float32",
    "kv-cache-dtype": "fp8_e4m3",
    "page-size": 16,
    "kv-pool-mib": 8,
    "max-step-tokens": 96,
}
# The demo model's: 64 bytes, a scale, 32 values of two bytes.
LAYOUT = KvLayout(4, 16, CacheDtype.FP8_E4M3, LatentAttention(64, 32))
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=48)
# Longer than a step, and no whole number of pages.
PROMPT = "Once upon a time there was a little fox named Zorvim." + " The fox lived in the forest with a bear." * 14


@pytest.fixture(scope="module")
def cluster(model_dir: Path):
    with LocalCluster(model_dir, worker_options=OPTIONS) as cluster:
        yield cluster


def test_colocated_and_disaggregated_give_the_same_tokens(cluster: LocalCluster, model_dir: Path):
    with (
        LocalCluster(model_dir, num_prefill=0, num_decode=0, num_both=1, worker_options=OPTIONS) as both,
        Client(both.router_address) as colocated,
        Client(cluster.router_address) as disaggregated,
    ):
        assert LAYOUT.token_bytes == 4 * 132
        for client in (colocated, disaggregated):
            assert {worker.num_pages for worker in client.server_info().workers} == {(8 << 20) // LAYOUT.page_bytes}
        # The second time both have the prompt's whole pages in their prefix caches.
        for params in (GREEDY, SAMPLED, GREEDY):
            one = colocated.generate(PROMPT, params, include_timings=True)
            other = disaggregated.generate(PROMPT, params, include_timings=True)
            assert one.token_ids == other.token_ids
            assert one.timings.num_transfer_pages == 0
            assert other.timings.num_transfer_pages > 0
            assert other.timings.transfer_bytes == other.timings.num_transfer_pages * LAYOUT.page_bytes


def test_a_worker_with_another_cache_is_refused_by_the_options_name(cluster: LocalCluster):
    cluster.decode_options, cluster.wait_for_workers = {"kv-cache-dtype": "auto"}, False
    process = cluster.add_decode()
    with Client(cluster.router_address) as client:

        def detail() -> str:
            workers = client.server_info().workers
            return next((w.detail for w in workers if w.address == process.address and w.state == "refused"), "")

        asyncio.run(eventually(lambda: bool(detail()), "the router refuses the worker"))
        assert detail() == (
            "its cache layout differs from this fleet's: dtype float32, not fp8_e4m3 (--kv-cache-dtype, --dtype)"
        )
        assert client.generate(PROMPT, GREEDY).token_ids, "the others serve on"
