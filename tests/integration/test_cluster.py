"""Two prefill and two decode workers, a router, and what their clients see."""

import asyncio
import urllib.request

import pytest
from headrace_client import AsyncClient, ChatMessage, Client
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.request import FinishReason, SamplingParams
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.cluster_checks import all_pages_free
from headrace_core.transfer.transports import usable

GREEDY = SamplingParams(temperature=0.0, max_tokens=64)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=48)
PROMPT = "Once upon a time there was a little fox named Zorvim."


@pytest.fixture(scope="module")
def cluster(model_dir):
    # Small pages and a small pool: prompts cross page borders, and 32 sequences queue for pages.
    options = {"dtype": "float32", "page-size": 16, "kv-pool-mib": 8, "max-step-tokens": 96}
    with LocalCluster(model_dir, num_prefill=2, num_decode=2, worker_options=options) as cluster:
        yield cluster


def run(cluster, test):
    """Run `test(client)`, then check that nothing is held anywhere."""

    async def main():
        async with AsyncClient(cluster.router_address) as client:
            await test(client)
            await all_pages_free(client.server_info)

    asyncio.run(main())


def test_32_concurrent_streams_equal_transformers(cluster, reference):
    """Prompts of 1 to 404 tokens, outputs of 1 to 63."""
    words = reference.tokenize(PROMPT + " The fox lived in the forest with a bear." * 40)
    requests = [(words[: 1 + 13 * i], 1 + 2 * i) for i in range(32)]

    async def test(client):
        results = await asyncio.gather(
            *(
                client.generate(prompt, SamplingParams(temperature=0.0, max_tokens=most), timeout_s=4 * WAIT_S)
                for prompt, most in requests
            )
        )
        for (prompt, most), result in zip(requests, results, strict=True):
            want = reference.greedy(prompt, most)
            assert list(result.token_ids) == want
            assert result.text == reference.text(want)
            assert result.usage.num_prompt_tokens == len(prompt)
            assert result.usage.num_output_tokens == len(want)

    run(cluster, test)


def test_a_stream_comes_in_pieces_that_join_to_the_answer(cluster):
    async def test(client):
        whole = await client.generate(PROMPT, GREEDY)
        async with client.stream(PROMPT, GREEDY) as stream:
            pieces = [delta async for delta in stream]
        assert len(pieces) > 5
        assert "".join(piece.text for piece in pieces) == whole.text
        assert tuple(token for piece in pieces for token in piece.token_ids) == whole.token_ids
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)

    run(cluster, test)


def test_colocated_and_disaggregated_give_the_same_tokens(cluster, model_dir):
    """Greedy and sampled; one process that does both against the four of the cluster."""
    options = {"dtype": "float32", "page-size": 16, "kv-pool-mib": 8}
    with (
        LocalCluster(model_dir, num_prefill=0, num_decode=0, num_both=1, worker_options=options) as both,
        Client(both.router_address) as colocated,
        Client(cluster.router_address) as disaggregated,
    ):
        for params in (GREEDY, SAMPLED):
            one = colocated.generate(PROMPT, params, n=3, include_timings=True)
            other = disaggregated.generate(PROMPT, params, n=3, include_timings=True)
            assert [sample.token_ids for sample in one.samples] == [sample.token_ids for sample in other.samples]
            assert one.timings.num_transfer_pages == 0
            assert other.timings.num_transfer_pages > 0


def test_samples_differ_and_a_seed_repeats_them(cluster):
    async def test(client):
        first = await client.generate(PROMPT, SAMPLED, n=4)
        again = await client.generate(PROMPT, SAMPLED, n=4)
        assert [sample.token_ids for sample in first.samples] == [sample.token_ids for sample in again.samples]
        assert len({sample.token_ids for sample in first.samples}) == 4

    run(cluster, test)


def test_logprobs_cover_every_token_the_first_included(cluster):
    async def test(client):
        params = SamplingParams(temperature=0.0, max_tokens=8, top_logprobs=3, ignore_eos=True)
        result = await client.generate(PROMPT, params)
        assert len(result.logprobs) == len(result.token_ids) == 8
        for token_id, logprobs in zip(result.token_ids, result.logprobs, strict=True):
            assert logprobs.top[0] == (token_id, logprobs.logprob)
            assert len(logprobs.top) == len(logprobs.top_tokens) == 3
            assert logprobs.top_tokens[0] == logprobs.token
            assert logprobs.logprob <= 0
        assert b"".join(logprobs.token for logprobs in result.logprobs).decode() == result.text

    run(cluster, test)


def test_a_stop_string_ends_the_text_before_it(cluster):
    async def test(client):
        whole = await client.generate(PROMPT, GREEDY)
        stop = whole.text[20:26]
        result = await client.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=64, stop_strings=(stop,)))
        assert result.text == whole.text[: whole.text.index(stop)]
        assert result.finish_reason is FinishReason.STOP
        assert result.samples[0].matched_stop_string == stop

    run(cluster, test)


def test_a_conversation_is_rendered_by_the_chat_template(cluster, reference):
    async def test(client):
        message = [ChatMessage("user", "Tell me a story about a bear named Zimbo.")]
        result = await client.generate(message, GREEDY)
        ids = reference.chat([{"role": "user", "content": message[0].content}])
        assert list(result.token_ids) == reference.greedy(ids, 64)

    run(cluster, test)


def test_a_repeated_prompt_is_found_in_the_prefix_cache(cluster):
    async def test(client):
        prompt = "A bear named Zimbo walked to the river, because the sun was warm and the day was long. " * 3
        results = [await client.generate(prompt, GREEDY) for _ in range(3)]
        assert len({result.token_ids for result in results}) == 1
        assert max(result.usage.num_cached_tokens for result in results) >= 16

    run(cluster, test)


def test_time_is_accounted_for(cluster):
    async def test(client):
        timings = (await client.generate(PROMPT, GREEDY, include_timings=True)).timings
        assert sum(phase.duration_us for phase in timings.phases) == timings.total_us
        first = [phase.duration_us for phase in timings.phases if phase.is_before_first_token]
        assert sum(first) == timings.ttft_us > 0
        assert {"queue", "prefill", "transfer", "decode"} <= {phase.name for phase in timings.phases}
        assert timings.transport == usable("auto")[0]
        workers = (await client.server_info()).workers
        assert {worker.role: worker.transport_in_use for worker in workers} == {
            "prefill": "",
            "decode": timings.transport,
        }
        assert all(worker.transfer_bytes_per_s > 0 for worker in workers if worker.transport_in_use)
        assert timings.num_attempts == 1
        assert timings.transfer_bytes > 0

    run(cluster, test)


def test_every_process_exports_what_it_did(cluster):
    async def test(client):
        await client.generate(PROMPT, GREEDY)

    run(cluster, test)
    wanted = {
        "router": ["headrace_ttft_seconds_count", "headrace_itl_seconds_count", "headrace_tpot_seconds_count",
                   "headrace_e2e_seconds_count", "headrace_phase_seconds_count", "headrace_output_tokens_total"],
        "prefill": ["headrace_prefilled_tokens_total", "headrace_kv_pages", "headrace_lease_ends_total",
                    "headrace_expert_tokens_total"],
        "decode": ["headrace_sampled_tokens_total", "headrace_kv_pages", "headrace_transfer_bytes_total",
                   "headrace_expert_tokens_total"],
    }  # fmt: skip
    for role, names in wanted.items():
        text = ""
        for process in (process for process in cluster.processes if process.role == role):
            with urllib.request.urlopen(f"http://{process.metrics_address}/metrics", timeout=WAIT_S) as answer:
                text += answer.read().decode()
        for name in names:
            values = [float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)]
            assert sum(values) > 0, f"{role}: {name} is absent or 0"


def test_workers_join_and_leave_at_run_time(cluster):
    async def test(client):
        before = {worker.address for worker in (await client.server_info()).workers}
        process = await asyncio.to_thread(cluster.add_prefill)
        assert process.address not in before
        results = await asyncio.gather(*(client.generate(PROMPT + " " * i, GREEDY) for i in range(6)))
        process.terminate()
        results += await asyncio.gather(*(client.generate(PROMPT + " " * i, GREEDY) for i in range(6)))
        assert [result.token_ids for result in results[:6]] == [result.token_ids for result in results[6:]]
        assert await asyncio.to_thread(process.wait, WAIT_S)
        assert process.poll() == 0

    run(cluster, test)


def test_nothing_that_was_said_is_in_the_logs(cluster):
    lines = [line for process in cluster.processes for line in process.lines()]
    assert lines
    assert not [line for line in lines if "Zorvim" in line or "Zimbo" in line]
