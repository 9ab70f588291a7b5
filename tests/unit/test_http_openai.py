"""OpenAI's endpoints: what clients get, streamed and not, and how errors are told."""

import pytest
from headrace_core.testing.api_keys import make_keys
from headrace_core.testing.async_test import async_test
from headrace_router.testing import (
    BOS,
    EOS,
    HELLO,
    RouterUnderTest,
    remembered,
    remembering_worker,
    scripted_worker,
    wait_until,
)

from tests.unit.http_parts import Http, once, run_http

HI = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def pair(**options):
    return [scripted_worker("prefill", **options), scripted_worker("decode", **options)]


def test_a_completion_in_one_body(tmp_path):
    async def test(router, address):
        answer = await once(address, "POST", COMPLETIONS, {"prompt": "Hi", "max_tokens": 12, "model": "tiny"})
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        (choice,) = answer.json["choices"]
        assert choice == {"index": 0, "logprobs": None, "finish_reason": "length", "text": HELLO.encode()[:12].decode()}
        assert answer.json["object"] == "text_completion"
        assert answer.json["id"] == "cmpl-" + answer.headers["x-request-id"]
        assert answer.json["usage"] == {
            "prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 0},
        }  # fmt: skip

    run_http(tmp_path, pair(), test)


def test_a_completion_without_max_tokens_has_16_and_a_conversation_all_that_fit(tmp_path):
    async def test(router, address):
        short = await once(address, "POST", COMPLETIONS, {"prompt": "Hi"})
        assert short.json["usage"]["completion_tokens"] == 16
        long = (await once(address, "POST", CHAT, {"messages": HI})).json["usage"]
        assert long["total_tokens"] == 1024

    run_http(tmp_path, pair(), test)


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"], [BOS, *b"Hi"], [[BOS, *b"Hi"]]])
def test_a_prompt_is_a_text_or_ids_or_a_list_of_one(tmp_path, prompt):
    async def test(router, address):
        answer = await once(address, "POST", COMPLETIONS, {"prompt": prompt, "max_tokens": 5, "return_token_ids": True})
        (choice,) = answer.json["choices"]
        assert choice["token_ids"] == remembered("Hi", 5)
        assert choice["prompt_token_ids"] == [BOS, *b"Hi"]

    run_http(tmp_path, [remembering_worker("both")], test)


def test_a_streamed_conversation(tmp_path):
    async def test(router, address):
        body = {"messages": HI, "max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}
        answer = await once(address, "POST", CHAT, body, x_request_id="mine-1")
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.text == {0: HELLO}
        first, *_, last, usage, done = answer.events
        assert first["object"] == "chat.completion.chunk"
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": "H"}
        assert {event["id"] for event in answer.events[:-1]} == {"chatcmpl-mine-1"}
        assert [event["usage"] for event in answer.events[:-2]] == [None] * (len(answer.events) - 2)
        assert last["choices"][0]["finish_reason"] == "length"
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == len(HELLO.encode())
        assert done == "[DONE]"

    run_http(tmp_path, pair(), test)


def test_a_stream_has_an_event_for_each_step_and_none_for_half_a_character(tmp_path):
    async def test(router, address):
        body = {"prompt": "Hi", "max_tokens": 10, "stream": True}
        answer = await once(address, "POST", COMPLETIONS, body)
        texts = [event["choices"][0]["text"] for event in answer.events[:-1]]
        assert texts == ["H", "e", "l", "l", "o", ",", " ", "w", "ö"]

    run_http(tmp_path, pair(), test)


def test_counts_in_every_event(tmp_path):
    async def test(router, address):
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"prompt": "Hi", "max_tokens": 3, "stream": True, "stream_options": options}
        events = (await once(address, "POST", COMPLETIONS, body)).events[:-1]
        assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]
        assert {event["usage"]["prompt_tokens"] for event in events} == {3}

    run_http(tmp_path, pair(), test)


def test_samples_are_choices(tmp_path):
    async def test(router, address):
        body = {"prompt": "Hi", "max_tokens": 4, "n": 3}
        whole = (await once(address, "POST", COMPLETIONS, body)).json
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
        assert whole["usage"]["completion_tokens"] == 12
        streamed = await once(address, "POST", COMPLETIONS, {**body, "stream": True})
        assert streamed.text == dict.fromkeys(range(3), "Hell")
        assert streamed.events[-1] == "[DONE]"

    run_http(tmp_path, pair(), test)


def test_echo_and_stop(tmp_path):
    async def test(router, address):
        for stream in (False, True):
            body = {"prompt": "Höi", "max_tokens": 20, "echo": True, "stop": ["wörld"], "stream": stream}
            answer = await once(address, "POST", COMPLETIONS, body)
            if stream:
                choice = {**answer.events[-2]["choices"][0], "text": answer.text[0]}
            else:
                choice = answer.json["choices"][0]
            assert choice["text"] == "HöiHello, "
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "wörld")

    run_http(tmp_path, pair(), test)


def test_the_end_of_a_text_is_a_stop(tmp_path):
    async def test(router, address):
        answer = await once(address, "POST", CHAT, {"messages": HI})
        (choice,) = answer.json["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("ab", "stop")
        assert "stop_reason" not in choice

    workers = pair(eos_token_ids=(EOS,))
    for worker in workers:
        worker.next_token = lambda tokens, num_prompt: [*b"ab", EOS][len(tokens) - num_prompt]
    run_http(tmp_path, workers, test)


def test_messages_of_parts_and_of_a_developer(tmp_path):
    async def test(router, address):
        parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
        messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
        body = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
        answer = await once(address, "POST", CHAT, body)
        assert answer.json["prompt_token_ids"] == [BOS, *b"[system]Be brief.[user]Hi[assistant]"]

    run_http(tmp_path, pair(), test)


def test_models_tokens_and_health(tmp_path):
    async def test(router, address):
        models = (await once(address, "GET", "/v1/models")).json
        assert [(each["id"], each["max_model_len"]) for each in models["data"]] == [("tiny", 1024)]
        assert (await once(address, "GET", "/v1/models/tiny")).json == models["data"][0]
        assert (await once(address, "GET", "/v1/models/other")).status == 404
        tokens = (await once(address, "POST", "/tokenize", {"prompt": "Hi"})).json
        assert tokens == {"count": 3, "max_model_len": 1024, "tokens": [BOS, *b"Hi"]}
        tokens = (await once(address, "POST", "/tokenize", {"messages": HI})).json
        assert tokens["tokens"] == [BOS, *b"[user]Hi[assistant]"]
        assert (await once(address, "GET", "/health")).status == 200
        assert (await once(address, "HEAD", "/ready")).status == 200
        metrics = await once(address, "GET", "/metrics")
        assert b'headrace_requests_total{outcome="ok",role="router"}' in metrics.body
        open_metrics = await once(address, "GET", "/metrics", accept="application/openmetrics-text; version=1.0.0")
        assert open_metrics.body.endswith(b"# EOF\n")

    run_http(tmp_path, pair(), test)


REFUSED = [
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, 400, "tools.0.function", "BAD_REQUEST"),
    (CHAT, {"messages": HI, "response_format": {"type": "xml"}}, 400, "response_format.type", "BAD_REQUEST"),
    (CHAT, {"messages": HI, "colour": "red"}, 400, "colour", "BAD_REQUEST"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role", "BAD_REQUEST"),
    (CHAT, {"messages": HI, "top_logprobs": 2}, 400, "top_logprobs", "BAD_REQUEST"),
    (CHAT, {"messages": HI, "stream_options": {}}, 400, "stream_options", "BAD_REQUEST"),
    (CHAT, {"messages": []}, 400, "messages", "EMPTY_PROMPT"),
    (CHAT, {}, 400, "messages", "BAD_REQUEST"),
    (COMPLETIONS, {}, 400, "prompt", "BAD_REQUEST"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "EMPTY_PROMPT"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "EMPTY_PROMPT"),
    (COMPLETIONS, {"prompt": ["a", ""]}, 400, "prompt", "EMPTY_PROMPT"),
    (COMPLETIONS, {"prompt": ["a"] * 65, "n": 2}, 400, "prompt", "BAD_REQUEST"),
    (COMPLETIONS, {"prompt": {"text": "x"}}, 400, "prompt", "BAD_REQUEST"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": "5"}, 400, "max_tokens", "BAD_REQUEST"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"x": 1}}, 400, "logit_bias", "BAD_REQUEST"),
    (COMPLETIONS, {"prompt": "x", "model": "gpt-5"}, 404, "model", "model_not_found"),
    (COMPLETIONS, {"prompt": "x", "temperature": 1e39}, 422, "temperature", "BAD_SAMPLING"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 422, "max_tokens", "BAD_SAMPLING"),
    (COMPLETIONS, {"prompt": [999999]}, 422, "prompt", "BAD_TOKEN"),
    (COMPLETIONS, {"prompt": [5] * 2000}, 400, "prompt", "context_length_exceeded"),
    (COMPLETIONS, b"{", 400, None, "BAD_REQUEST"),
    (COMPLETIONS, b"[]", 400, None, "BAD_REQUEST"),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, None, "BAD_REQUEST"),
    (COMPLETIONS, b"\xff", 400, None, "BAD_REQUEST"),
    ("/v1/nothing", {}, 404, None, "BAD_REQUEST"),
]


def test_what_can_not_be_served_is_refused_by_name(tmp_path):
    async def test(router, address):
        for path, body, status, param, code in REFUSED:
            answer = await once(address, "POST", path, body)
            assert (answer.status, answer.error["param"], answer.error["code"]) == (status, param, code), body
            assert set(answer.error) == {"message", "type", "param", "code"}
            assert answer.error["type"] == "invalid_request_error"
            assert param is None or param in answer.error["message"]

    run_http(tmp_path, pair(), test)


def test_what_http_itself_refuses(tmp_path):
    async def test(router, address):
        wrong_method = await once(address, "GET", COMPLETIONS)
        assert (wrong_method.status, wrong_method.headers["allow"]) == (405, "post")
        assert (await once(address, "POST", COMPLETIONS, {"prompt": "x"}, content_type="text/plain")).status == 415
        wrong_id = await once(address, "POST", COMPLETIONS, {"prompt": "x"}, x_request_id="a b")
        assert wrong_id.status == 400
        assert wrong_id.headers["x-request-id"] != "a b"

    run_http(tmp_path, pair(), test)


def test_a_full_queue_is_429_and_says_when_to_come_again(tmp_path):
    async def test(router, address):
        async with Http(address) as first, Http(address) as second:
            first.ask("POST", COMPLETIONS, {"prompt": "Hi"})
            await wait_until(lambda: router.service._router.num_queued == 1)
            second.ask("POST", COMPLETIONS, {"prompt": "Hi"})
            answer = await second.answer()
        assert (answer.status, answer.error["code"]) == (429, "QUEUE_FULL")
        assert answer.error["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == "1"
        assert 0 < int(answer.headers["retry-after-ms"]) <= 1000

    run_http(tmp_path, [], test, max_queued_requests=1)


def test_without_workers_503_and_past_the_deadline_504(tmp_path):
    async def test(router, address):
        answer = await once(address, "POST", COMPLETIONS, {"prompt": "Hi"})
        assert (answer.status, answer.error["code"]) == (503, "NO_WORKERS")
        assert "retry-after" in answer.headers

    run_http(tmp_path / "none", [], test, no_workers_timeout_s=0.05)

    async def late(router, address):
        answer = await once(address, "POST", COMPLETIONS, {"prompt": "Hi"})
        assert (answer.status, answer.error["code"]) == (504, "DEADLINE_EXCEEDED")

    run_http(tmp_path / "late", [], late, request_timeout_s=0.05)


@async_test
async def test_a_key_is_asked_for_but_by_probes(tmp_path):
    keys, entries = make_keys("alice")
    (tmp_path / "keys.toml").write_text(entries)
    settings = {"keys_file": tmp_path / "keys.toml", "http_listen": "127.0.0.1:0"}
    async with RouterUnderTest(tmp_path, workers=pair(), settings=settings) as router:
        address, body = router.service.addresses["http_address"], {"prompt": "Hi", "max_tokens": 1}
        for wrong in (None, "Bearer hr_alice_x", "Basic x"):
            answer = await once(address, "POST", COMPLETIONS, body, authorization=wrong)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "bearer"
        right = f"Bearer {keys['alice']}"
        for place in ("/v1/models", "/metrics"):
            assert (await once(address, "GET", place)).status == 401
            assert (await once(address, "GET", place, authorization=right)).status == 200
        assert (await once(address, "GET", "/health")).status == 200
        assert (await once(address, "POST", COMPLETIONS, body, authorization=right)).status == 200


def test_its_own_description_names_every_endpoint(tmp_path):
    async def test(router, address):
        found = (await once(address, "GET", "/openapi.json")).json
        assert {COMPLETIONS, CHAT, "/tokenize", "/v1/models"} <= set(found["paths"])
        assert found["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False

    run_http(tmp_path, pair(), test)


RESPONSES = "/v1/responses"


def test_a_response_in_one_body(tmp_path):
    async def test(router, address):
        body = {"input": "Hi", "instructions": "Be brief.", "max_output_tokens": 20, "temperature": 0.5}
        found = (await once(address, "POST", RESPONSES, body, x_request_id="mine")).json
        assert (found["id"], found["object"], found["status"]) == ("resp-mine", "response", "incomplete")
        assert found["incomplete_details"] == {"reason": "max_output_tokens"}
        assert (found["instructions"], found["temperature"]) == ("Be brief.", 0.5)
        ((item,), (part,)) = found["output"], found["output"][0]["content"]
        assert (item["role"], part["text"]) == ("assistant", HELLO)
        num_prompt = len("[system]Be brief.[user]Hi[assistant]") + 1
        assert (found["usage"]["input_tokens"], found["usage"]["output_tokens"]) == (num_prompt, 20)
        turns = [{"role": "user", "content": "Hi"}, item, {"role": "user", "content": "More"}]
        again = (await once(address, "POST", RESPONSES, {"input": turns, "max_output_tokens": 1})).json
        assert again["usage"]["input_tokens"] == len(f"[user]Hi[assistant]{HELLO}[user]More[assistant]".encode()) + 1

    run_http(tmp_path, pair(), test)


def test_a_streamed_response_names_its_events(tmp_path):
    async def test(router, address):
        body = {"input": "Hi", "max_output_tokens": 4, "stream": True}
        answer = await once(address, "POST", RESPONSES, body)
        names = [line[7:] for line in answer.body.decode().splitlines() if line.startswith("event: ")]
        assert names == [event["type"] for event in answer.events]
        begin = [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        end = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
        assert names == [*begin, *["response.output_text.delta"] * 4, *end, "response.incomplete"]
        assert [event["sequence_number"] for event in answer.events] == list(range(12))
        assert "".join(event.get("delta", "") for event in answer.events) == "Hell"
        assert answer.events[-1]["response"]["output"][0]["content"][0]["text"] == "Hell"

    run_http(tmp_path, pair(), test)


def test_a_response_that_can_not_be_is_refused_by_name(tmp_path):
    async def test(router, address):
        for fields, param in (
            ({"tools": [{"type": "web_search"}]}, "tools"),
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
            ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
            ({"colour": 1}, "colour"),
        ):
            answer = await once(address, "POST", RESPONSES, {"input": "Hi", **fields})
            assert answer.status == 400
            assert answer.error["param"].startswith(param)

    run_http(tmp_path, pair(), test)
