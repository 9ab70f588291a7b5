"""Several prompts in one body of /v1/completions: a choice for each, whole and streamed, and one end for all."""

import pytest
from headrace_core.errors import UnavailableError
from headrace_core.testing.api_keys import make_keys
from headrace_core.testing.async_test import async_test
from headrace_router.testing import (
    BOS,
    RouterUnderTest,
    remembered,
    remembering_worker,
    scripted_worker,
    wait_until,
)

from tests.unit.http_parts import Http, once, run_http

PATH = "/v1/completions"


@pytest.mark.parametrize("prompt", [["Hi", "Hello"], [[BOS, *b"Hi"], [BOS, *b"Hello"]]])
def test_a_list_of_prompts_has_n_choices_for_each_in_order(tmp_path, prompt):
    async def test(router, address):
        body = {"prompt": prompt, "max_tokens": 5, "n": 2, "echo": True, "return_token_ids": True}
        whole = (await once(address, "POST", PATH, body)).json
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
        expected = [("Hi", remembered("Hi", 5))] * 2 + [("Hello", remembered("Hello", 5))] * 2
        for choice, (text, ids) in zip(whole["choices"], expected, strict=True):
            assert choice["text"].startswith(text)
            assert (choice["token_ids"], choice["prompt_token_ids"]) == (ids, [BOS, *text.encode()])
        assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (3 + 6, 20)

        options = {"include_usage": True, "continuous_usage_stats": True}
        streamed = await once(address, "POST", PATH, {**body, "stream": True, "stream_options": options})
        assert streamed.text == {choice["index"]: choice["text"] for choice in whole["choices"]}
        shown = {}
        for event in streamed.events[:-2]:
            (choice,) = event["choices"]
            if "prompt_token_ids" in choice:
                shown[choice["index"]] = choice["prompt_token_ids"]
        assert shown == {choice["index"]: choice["prompt_token_ids"] for choice in whole["choices"]}
        assert streamed.events[-2]["usage"] == whole["usage"]
        assert streamed.events[-1] == "[DONE]"

    run_http(tmp_path, [remembering_worker("both")], test)


def test_what_ends_one_prompt_ends_all_and_nothing_is_left(tmp_path):
    async def test(router, address):
        answer = await once(address, "POST", PATH, {"prompt": [[BOS, 1], [BOS, 2], [999_999]]})
        assert (answer.status, answer.error["code"]) == (422, "BAD_TOKEN")
        await router.wait_empty()
        async with Http(address) as http:
            http.ask("POST", PATH, {"prompt": ["a", "b"], "stream": True})
            assert (await http.head())[0] == 200
            first = next(iter(router.service._router._running.values()))
            first.fail(UnavailableError("DRAINING", "stop"))
            last = chunk = await http.chunk()
            while chunk:
                last, chunk = chunk, await http.chunk()
            assert last.startswith(b"event: error")
            assert b"DRAINING" in last
        await router.wait_empty()

    decode = scripted_worker("decode", step_s=0.02)
    run_http(tmp_path, [scripted_worker("prefill"), decode], test)


def test_a_client_that_leaves_cancels_all_its_prompts(tmp_path):
    decode = scripted_worker("decode", step_s=None)

    async def test(router, address):
        async with Http(address) as http:
            http.ask("POST", PATH, {"prompt": ["a", "b", "c"], "max_tokens": 9})
            await wait_until(lambda: len(router.service._router._running) == 3)
        await router.wait_empty()
        assert router.metric("headrace_requests_total", outcome="cancelled") == 3

    run_http(tmp_path, [scripted_worker("prefill"), decode], test)


@async_test
async def test_each_prompt_counts_against_a_keys_requests(tmp_path):
    keys, entries = make_keys("alice", requests_per_minute=3)
    (tmp_path / "keys.toml").write_text(entries)
    settings = {"keys_file": tmp_path / "keys.toml", "http_listen": "127.0.0.1:0"}
    async with RouterUnderTest(tmp_path, workers=[remembering_worker("both")], settings=settings) as router:
        address, right = router.service.addresses["http_address"], f"Bearer {keys['alice']}"
        body = {"prompt": ["a", "b", "c"], "max_tokens": 1}
        assert (await once(address, "POST", PATH, body, authorization=right)).status == 200
        again = await once(address, "POST", PATH, {**body, "prompt": "a"}, authorization=right)
        assert (again.status, again.error["code"]) == (429, "rate_limit_exceeded")
        assert "retry-after" in again.headers
