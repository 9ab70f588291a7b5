"""What an ill-willed client sends: each has its status, its field's name, and a router that goes on as before.

`test_http_connection` breaks the connection alone, `test_http_document` sends what the schema says; here are the forms
that people and tools think of.
"""

import asyncio
import gc
import json
import socket
import struct

import pytest
from headrace_core.testing.api_keys import make_keys
from headrace_core.testing.async_test import async_test
from headrace_router.face.http import connection
from headrace_router.face.http.exchange import Exchange
from headrace_router.testing import BOS, RouterUnderTest, scripted_worker, wait_until

from tests.unit.http_parts import Http, once, request, run_http

COMPLETIONS, CHAT, RESPONSES, TOKENIZE = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def said(fields):
    """Fields of a completion, as they stand in JSON."""
    return b'{"prompt": "Hi", "max_tokens": 2, ' + fields.encode() + b"}"


def schema(inner):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": inner}}


NO_JSON = [
    b"", b"{", b"nonsense", b"[]", b"7", b'"text"', b"null", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{}{}", b"{'a': 1}",
    b'{"prompt": "\xc3"}', b'{"prompt": "a\nb"}', b'{"prompt": "\\ud800"}', b'{"prompt": "\\ud800\\u0041"}',
    b'{"prompt": "x",}', b'{"prompt": "x", "n": 01}',
    b'{"prompt": "x", "chat": ' + b"[" * 5000 + b"]" * 5000 + b"}",
]  # fmt: skip
NUMBERS = [
    ('"temperature": 1e999', 400, "temperature"),
    ('"temperature": -1e999', 400, "temperature"),
    ('"temperature": NaN', 400, "temperature"),
    ('"temperature": Infinity', 400, "temperature"),
    ('"temperature": 1e39', 422, "temperature"),
    ('"temperature": "1"', 400, "temperature"),
    ('"temperature": true', 400, "temperature"),
    ('"top_p": 0', 422, "top_p"),
    ('"min_p": 1.5', 422, "min_p"),
    ('"presence_penalty": 3', 422, "presence_penalty"),
    ('"frequency_penalty": -3', 422, "frequency_penalty"),
    ('"repetition_penalty": 0', 422, "repetition_penalty"),
    ('"n": 1.0', 400, "n"),
    ('"n": 0', 400, "n"),
    ('"n": -1', 400, "n"),
    ('"n": 128', 400, "n"),
    ('"n": 99999999999999999999999', 400, "n"),
    ('"best_of": 4', 400, "best_of"),
    ('"seed": 1180591620717411303424', 400, "seed"),
    ('"seed": -1', 400, "seed"),
    ('"seed": 1.0', 400, "seed"),
    ('"seed": 18446744073709551615', 200, None),
    ('"top_k": 1180591620717411303424', 400, "top_k"),
    ('"min_tokens": 3', 422, "min_tokens"),
    ('"logprobs": 21', 422, "logprobs"),
    ('"logprobs": true', 400, "logprobs"),
    ('"priority": 2147483648', 400, "priority"),
    ('"service_tier": "none such"', 400, "service_tier"),
    ('"slo_ttft_ms": -1', 400, "slo_ttft_ms"),
    ('"max_tokens": 1', 200, None),  # said twice: the last counts
    ('"logit_bias": {"999999": 1}', 422, "logit_bias"),
    ('"logit_bias": {"5": 101}', 422, "logit_bias"),
    ('"logit_bias": {"5": NaN}', 400, "logit_bias"),
    ('"logit_bias": {"-1": 1}', 400, "logit_bias"),
    ('"logit_bias": {"5.0": 1}', 400, "logit_bias"),
    ('"logit_bias": {"99999999999999999999": 1}', 400, "logit_bias"),
    ('"logit_bias": [1]', 400, "logit_bias"),
    ('"stop": [""]', 422, "stop"),
    ('"stop": ""', 422, "stop"),
    ('"stop": [1]', 400, "stop"),
    (f'"stop": {json.dumps(["x"] * 10_000)}', 422, "stop"),
    (f'"stop": "{"x" * (1 << 20)}"', 422, "stop"),
    (f'"stop_token_ids": {[5] * 10_000}', 422, "stop_token_ids"),
    ('"stop_token_ids": [-1]', 400, "stop_token_ids.0"),
    ('"stop_token_ids": [999999]', 422, "stop_token_ids"),
    ('"stream_options": {"include_usage": true}', 400, "stream_options"),
    ('"stream_options": {"include_usage": 1}, "stream": true', 400, "stream_options.include_usage"),
    ('"stream_options": {"colour": 1}, "stream": true', 400, "stream_options.colour"),
    ('"stream_options": {"include_obfuscation": true}, "stream": true', 400, "stream_options.include_obfuscation"),
    ('"user": 5', 400, "user"),
    (f'"{"x" * (1 << 20)}": 1', 400, "x" * 300),
]  # fmt: skip
BODIES = [
    (COMPLETIONS, b"[" * 100_000, 400, "prompt"),
    (COMPLETIONS, b'{"a":' * 100_000, 400, "prompt"),
    (COMPLETIONS, {"prompt": [[BOS], []]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [1.0]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [["a"]]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "x" * (1 << 20)}, 400, "prompt"),
    (COMPLETIONS, {"prompt_token_ids": [-1]}, 400, "prompt_token_ids.0"),
    (COMPLETIONS, {"prompt": "x", "prompt_embeds": "AAAA"}, 400, "prompt_embeds"),
    (COMPLETIONS, {"prompt": [5] * 900, "echo": True, "logprobs": 20, "max_tokens": 0, "n": 2}, 400, "n"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": HI * 4097}, 400, "messages"),
    (CHAT, {"messages": "Hi"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [CALL, {"role": "tool", "content": "7"}]}, 400, "messages.1.tool_call_id"),
    (CHAT, {"messages": HI, "max_tokens": 2, "max_completion_tokens": 3}, 400, "max_completion_tokens"),
    (CHAT, {"messages": HI, "max_completion_tokens": 0}, 422, "max_completion_tokens"),
    (CHAT, {"messages": HI, "best_of": 2}, 400, "best_of"),
    (CHAT, {"messages": HI, "tool_choice": "required"}, 400, "tool_choice"),
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400,
     "tool_choice"),
    (CHAT, {"messages": HI, "tools": [TOOL] * 129}, 400, "tools"),
    (CHAT, {"messages": HI, "tools": [TOOL, TOOL], "tool_choice": "none"}, 400, "tools"),
    (CHAT, {"messages": HI, "response_format": schema({"type": "wizard"})}, 400, "response_format"),
    (CHAT, {"messages": HI, "response_format": schema({"$ref": "#/nowhere"})}, 400, "response_format"),
    (CHAT, {"messages": HI, "max_tokens": 1, "response_format": schema({"pattern": "(a{1,9999}){1,9999}"})}, 200, None),
    (CHAT, {"messages": HI, "max_tokens": 1, "guided_regex": "((a{1,999}){1,999}){1,999}"}, 200, None),
    (CHAT, {"messages": HI, "chat_template": "{% for x in range(10**9) %}{% endfor %}"}, 400, None),
    (CHAT, {"messages": HI, "chat_template": "x" * 65}, 400, "chat_template"),
    (RESPONSES, {"input": []}, 400, "input"),
    (RESPONSES, {"input": ""}, 200, None),
    (RESPONSES, {"input": "Hi", "max_output_tokens": 0}, 422, "max_output_tokens"),
    (RESPONSES, {"input": "Hi", "top_p": 2}, 422, "top_p"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input.0.content"),
    (RESPONSES, {"input": "Hi", "tools": [{"type": "web_search"}]}, 400, "tools.0.type"),
    (RESPONSES, {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 7}}}}, 400,
     "text.format"),
    (RESPONSES, {"input": "Hi", "previous_response_id": "resp-1"}, 400, "previous_response_id"),
    (TOKENIZE, {"prompt": "x", "messages": HI}, 400, "prompt"),
    (TOKENIZE, {"prompt": "x", "tools": [TOOL]}, 400, "tools"),
    (TOKENIZE, {"messages": []}, 400, "messages"),
]  # fmt: skip


def workers():
    return [scripted_worker("prefill"), scripted_worker("decode")]


def test_bodies_of_any_kind_have_their_status_and_their_fields_name(tmp_path):
    cases = [(COMPLETIONS, body, 400, None) for body in NO_JSON]
    cases += [(COMPLETIONS, said(fields), status, param) for fields, status, param in NUMBERS]
    cases += BODIES

    async def test(router, address):
        wrong = []
        async with Http(address) as http:  # one connection: what is refused spoils nothing
            for path, body, status, param in cases:
                http.ask("POST", path, body)
                answer = await http.answer()
                error = answer.error if answer.status != 200 else {"param": None, "type": "invalid_request_error"}
                found = (answer.status, error["param"], error["type"])
                if found[:2] != (status, param) or found[2] != "invalid_request_error":
                    wrong.append((path, str(body)[:120], (status, param), found, error.get("message", "")[:160]))
            http.ask("POST", COMPLETIONS, {"prompt": "Hi", "max_tokens": 2})
            assert (await http.answer()).status == 200
        assert not wrong, "\n".join(map(str, wrong))

    run_http(tmp_path, workers(), test)


FIELDS = {"message", "type", "param", "code"}
HELLO = {"prompt": "Hi", "max_tokens": 1}
CHUNKED = {"content_length": None, "transfer_encoding": "chunked"}
RAW = [
    (request("POST", COMPLETIONS, {"prompt": "Hi"}, content_type=None), 415),
    (request("POST", COMPLETIONS, {"prompt": "Hi"}, content_type="text/json"), 415),
    (request("POST", COMPLETIONS, {"prompt": "Hi"}, content_encoding="gzip"), 415),
    (request("POST", COMPLETIONS, HELLO, content_type="Application/JSON; charset=utf-8"), 200),
    (request("POST", COMPLETIONS, {"prompt": "Hi"}, x_request_id="x" * 65), 400),
    (request("POST", COMPLETIONS, {"prompt": "Hi"}, x_request_id="x" * 10_000), 400),
    (request("POST", COMPLETIONS, {"prompt": "Hi"}, x_request_id="x" * 20_000), 431),
    (request("POST", COMPLETIONS, {"prompt": "Hi"}, x_request_id="a\nb: c"), 400),
    (request("POST", COMPLETIONS, {"prompt": "Hi"}, x_request_id="a\r b"), 400),
    (request("OPTIONS", COMPLETIONS, origin="https://x", access_control_request_method="POST"), 405),
    (request("HEAD", COMPLETIONS), 405),
    (request("GET", COMPLETIONS), 405),
    (request("DELETE", "/v1/models"), 405),
    (request("BREW", "/health"), 400),
    (request("HEAD", "/health"), 200),
    (request("GET", "/v1/models/a%2fb"), 404),
    (request("GET", "/v1/models/%ff"), 404),
    (request("GET", "/v1/models/"), 404),
    (request("GET", "/health/../metrics"), 404),
    (request("POST", "/v1/embeddings", {}), 404),
    (request("POST", COMPLETIONS, {"prompt": "Hi"}, transfer_encoding="chunked"), 400),
    (request("POST", COMPLETIONS, b"\r\n", **CHUNKED), 400),
    (request("POST", COMPLETIONS, b"5\r\n{\r\n", content_length="7, 8"), 400),
    (request("POST", COMPLETIONS, b"2\r\n{},,\r\n0\r\n\r\n", **CHUNKED), 400),
    (request("POST", COMPLETIONS, b"1\r\n{\r\n0\r\nx: y\r\n\r\n", **CHUNKED), 400),
    (request("POST", COMPLETIONS, b"", content_length=str(1 << 40)), 413),
]  # fmt: skip
"""Whole requests, and the status of what comes back."""


def test_requests_of_any_form_have_their_status_and_spoil_nothing_for_others(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "_LINGER_S", 0.05)

    async def test(router, address):
        wrong = []
        async with Http(address) as other:
            for raw, status in RAW:
                async with Http(address) as http:
                    http.send(raw)
                    has_body = not raw.startswith(b"HEAD")
                    answer = await http.answer(has_body=has_body)
                    is_told = (
                        answer.status == 200
                        or not has_body
                        or set(answer.error) == {"message", "type", "param", "code"}
                    )
                if answer.status != status or not is_told:
                    wrong.append((raw[:120], status, answer.status, answer.body[:120]))
            other.ask("POST", COMPLETIONS, {"prompt": "Hi", "max_tokens": 2})
            assert (await other.answer()).status == 200
        assert not wrong, "\n".join(map(str, wrong))

    run_http(tmp_path, workers(), test)


@async_test
async def test_a_key_in_any_other_form_is_no_key(tmp_path):
    keys, entries = make_keys("alice")
    (tmp_path / "keys.toml").write_text(entries)
    settings = {"keys_file": tmp_path / "keys.toml", "http_listen": "127.0.0.1:0"}
    async with RouterUnderTest(tmp_path, workers=[scripted_worker("both")], settings=settings) as router:
        address, key = router.service.addresses["http_address"], keys["alice"]
        forms = [
            None,
            "",
            "Bearer",
            "Bearer ",
            key,
            f"Basic {key}",
            f"Bearer {key}x",
            f"Bearer {key} {key}",
            "Bearer \xff",
        ]
        for form in forms:
            answer = await once(address, "POST", COMPLETIONS, HELLO, authorization=form)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), form
            assert answer.error["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "bearer"
            assert key not in answer.body.decode()
        right = await once(address, "POST", COMPLETIONS, HELLO, authorization=f"Bearer {key}")
        assert right.status == 200


def test_a_body_that_comes_too_slowly_is_408(tmp_path):
    async def test(router, address):
        async with Http(address) as http:
            http.send(request("POST", COMPLETIONS, b'{"prompt"', content_length="40"))
            answer = await http.answer()
            assert (answer.status, answer.error["code"]) == (408, "MESSAGE_TIMEOUT")
            assert answer.headers["connection"] == "close"

    run_http(tmp_path, workers(), test, message_timeout_s=0.1)


@pytest.mark.parametrize("end", ["half-close", "reset"])
def test_streams_whose_clients_end_in_any_way_leave_nothing(tmp_path, end):
    decode = scripted_worker("decode", step_s=None)

    async def test(router, address):
        for _ in range(8):
            async with Http(address) as http:
                http.ask("POST", CHAT, {"messages": HI, "max_tokens": 9, "stream": True, "n": 2})
                assert (await http.head())[0] == 200
                if end == "half-close":
                    http.writer.write_eof()
                    await http.closed()
                else:
                    raw = http.writer.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    http.writer.transport.abort()
            await router.wait_empty()
        assert router.metric("headrace_requests_total", outcome="cancelled") == 8
        await wait_until(lambda: not len(router.service._http._connections))
        gc.collect()
        assert not [
            each for each in gc.get_objects() if type(each) is Exchange
        ]  # isinstance asks modules that are loaded late
        assert not [task for task in asyncio.all_tasks() if "Connection._run" in repr(task)]

    run_http(tmp_path, [scripted_worker("prefill"), decode], test)
