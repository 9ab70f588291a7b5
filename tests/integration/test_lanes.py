"""Workers whose ranks are lanes (attention DP), as real processes: their tokens are transformers', or one process's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.errors import HeadraceError
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.cluster_checks import all_pages_free

from tests.integration.test_rank_group import OPTIONS, PROMPT, metric, tokens_of, turns, turns_of_one_process

LANES = {"attention-tp": 1}


def test_a_decode_group_of_lanes_serves_what_transformers_would_say(model_dir: Path, reference):
    """More prompts than a lane has room for, side by side; one that fits the pool and no lane is refused."""
    words = reference.tokenize(PROMPT + " The fox lived in the forest with a bear." * 20)
    requests = [(words[: 1 + 3 * i], SamplingParams(temperature=0.0, max_tokens=100)) for i in range(14)]
    want = [reference.greedy(prompt, 100) for prompt, _ in requests]
    options = {**OPTIONS, "page-size": 32, "kv-pool-mib": 1, "max-context-tokens": 4000}

    async def main(cluster: LocalCluster) -> None:
        async with AsyncClient(cluster.router_address) as client:
            info = await client.server_info()
            assert len(info.workers) == 2, "a group is one worker"
            lane_tokens = next(w.num_pages for w in info.workers if w.role == "decode") // 2 * 32
            for told in await tokens_of(client, requests), await tokens_of(client, requests):
                assert told == want
            long = [5 + i % 1000 for i in range(lane_tokens)]
            with pytest.raises(HeadraceError) as refused:
                await client.generate(long, SamplingParams(temperature=0.0, max_tokens=8), timeout_s=WAIT_S)
            assert refused.value.reason == "NO_FREE_PAGES"
            assert f"holds {lane_tokens}" in str(refused.value)
            await all_pages_free(client.server_info)

    with LocalCluster(model_dir, decode_ranks=2, worker_options=options, decode_options=LANES,
                      prefill_options={"kv-pool-mib": 4}) as cluster:  # fmt: skip
        asyncio.run(main(cluster))
        _, decode = cluster.workers
        assert metric(decode.metrics_address, "headrace_ranks") == 2
        assert metric(decode.metrics_address, "headrace_transfer_bytes_total") > 0
        ranks = cluster.ranks(decode)
        decode.terminate()
        assert all(rank.wait(WAIT_S) for rank in ranks)
        assert [rank.poll() for rank in ranks] == [0, 0]


@pytest.mark.parametrize(
    ("kind", "prefill", "decode"),
    [
        ("v3", {"ranks": 2, "attention-tp": 1}, {"ranks": 2, "attention-tp": 2}),
        ("mixtral", {"ranks": 2, "attention-tp": 2}, {"ranks": 2, "attention-tp": 1, "experts": "tp"}),
    ],
    ids=["lanes to heads", "heads to lanes"],
)
def test_pages_pass_between_lanes_and_heads_in_both_directions(
    tmp_path: Path, model_dir: Path, kind: str, prefill: dict[str, object], decode: dict[str, object]
):
    """A second turn brings pages back from the lane of a decode group that generated the first."""
    want = turns_of_one_process(tmp_path, model_dir, kind)
    sides = {
        f"{side}_{name}": options.pop("ranks") if name == "ranks" else options
        for side, options in (("prefill", dict(prefill)), ("decode", dict(decode)))
        for name in ("ranks", "options")
    }
    with LocalCluster(tmp_path, worker_options=OPTIONS, **sides) as cluster:
        assert asyncio.run(turns(cluster)) == want
        assert metric(cluster.workers[0].metrics_address, "headrace_prefix_fetched_tokens_total") > 0
