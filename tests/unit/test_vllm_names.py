"""Metrics by vLLM's names: what they are made of, and that docs/metrics.md says so."""

from pathlib import Path

from headrace_router.testing import scripted_worker
from headrace_router.vllm_names import table
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.http_parts import Http, once, run_http

ROOT = Path(__file__).parents[2]


def samples(page):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def test_the_table_is_the_codes():
    assert (ROOT / "docs/metrics.md").read_text().endswith(table()), "python -m headrace_router.vllm_names writes it"


def test_each_is_one_of_ours_under_another_name(tmp_path):
    labels = (("engine", "0"), ("model_name", "tiny"), ("role", "router"))

    async def test(router, address):
        for most in (3, 5):
            await once(address, "POST", "/v1/completions", {"prompt": "Hi", "max_tokens": most})
        await router.wait_empty()
        found = samples((await once(address, "GET", "/metrics")).body)

        def theirs(name, *more):
            return found[name, *sorted([*labels, *more])]

        assert theirs("vllm:generation_tokens_total") == 8
        assert theirs("vllm:prompt_tokens_total") == 6
        assert theirs("vllm:request_success_total", ("finished_reason", "length")) == 2
        assert theirs("vllm:request_success_total", ("finished_reason", "stop")) == 0
        assert theirs("vllm:time_to_first_token_seconds_count") == 2
        assert theirs("vllm:inter_token_latency_seconds_count") == 6
        assert theirs("vllm:e2e_request_latency_seconds_bucket", ("le", "+Inf")) == 2
        assert theirs("vllm:request_queue_time_seconds_count") == 2
        assert theirs("vllm:num_requests_running") == theirs("vllm:num_requests_waiting") == 0
        assert 0 <= theirs("vllm:kv_cache_usage_perc") < 1
        assert found["headrace_output_tokens_total", ("role", "router")] == 8

    run_http(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test, metrics_compat="vllm")


def test_they_are_not_there_unless_asked_for(tmp_path):
    async def test(router, address):
        assert b"vllm:" not in (await once(address, "GET", "/metrics")).body

    run_http(tmp_path, [scripted_worker("both")], test)


def test_what_waits_does_not_run(tmp_path):
    async def test(router, address):
        async with Http(address) as http:
            http.ask("POST", "/v1/completions", {"prompt": "Hi"})
            while True:
                found = samples((await once(address, "GET", "/metrics")).body)
                values = {name: value for (name, *_), value in found.items() if name.startswith("vllm:num_requests")}
                if values["vllm:num_requests_waiting"]:
                    break
        assert values == {"vllm:num_requests_waiting": 1, "vllm:num_requests_running": 0}

    run_http(tmp_path, [], test, metrics_compat="vllm")
