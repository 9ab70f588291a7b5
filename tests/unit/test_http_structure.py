"""Grammars over HTTP: what clients say, what workers are told, and what is refused by name."""

import json

import pytest
from headrace.v1 import types_pb2
from headrace_core.request import MAX_GRAMMAR_BYTES
from headrace_router.testing import scripted_worker

from tests.unit.http_parts import once, run_http

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"b": {"enum": ["é"]}, "a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":"))
ANY = '{"type":"object"}'
NAMED = {"name": "x", "schema": SCHEMA, "strict": True}


def said(**fields):
    return types_pb2.Grammar(**fields)


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, said(json_schema=ANY)),
        ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, said(json_schema=TEXT)),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, said(json_schema=ANY)),
        ({"structured_outputs": {"json": SCHEMA}}, said(json_schema=TEXT)),
        ({"structured_outputs": {"json": TEXT}}, said(json_schema=TEXT)),
        ({"structured_outputs": {"json_object": True}}, said(json_schema=ANY)),
        ({"structured_outputs": {"regex": "a+"}}, said(regex="a+")),
        ({"structured_outputs": {"grammar": "start: /a/"}}, said(lark="start: /a/")),
        ({"guided_json": SCHEMA}, said(json_schema=TEXT)),
        ({"guided_regex": "a+"}, said(regex="a+")),
        ({"guided_choice": ["a b", '"c"\n']}, said(lark=r'start: "a b" | "\"c\"\n"')),
        ({"guided_grammar": "start: /a/"}, said(lark="start: /a/")),
    ],
)
def test_workers_are_told_the_grammar(tmp_path, fields, grammar):
    workers = [scripted_worker("prefill", eos_token_ids=(1,)), scripted_worker("decode", eos_token_ids=(1,))]

    async def test(router, address):
        for path, base in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "Hi"})):
            answer = await once(address, "POST", path, {**base, "max_tokens": 3, **fields})
            assert answer.status == 200, answer.body
            told = workers[1].starts[-1].sampling
            assert (told.grammar if told.HasField("grammar") else None) == grammar

    run_http(tmp_path, workers, test)


def test_a_response_is_held_to_its_format(tmp_path):
    workers = [scripted_worker("prefill"), scripted_worker("decode")]

    async def test(router, address):
        for form, grammar in (
            ({"type": "json_object"}, said(json_schema=ANY)),
            ({"type": "json_schema", **NAMED}, said(json_schema=TEXT)),
        ):
            body = {"input": "Hi", "max_output_tokens": 3, "text": {"format": form}}
            answer = await once(address, "POST", RESPONSES, body)
            assert answer.json["text"]["format"] == form
            assert workers[1].starts[-1].sampling.grammar == grammar

    run_http(tmp_path, workers, test)


REFUSED = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "BAD_REQUEST", "missing"),
    ({"guided_choice": []}, "guided_choice", "BAD_REQUEST", "at least one"),
    ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "BAD_REQUEST", "one of"),
    ({"structured_outputs": {"regex": "a", "colour": 1}}, "structured_outputs.colour", "BAD_REQUEST", "colour"),
    ({"guided_json": {"type": "wizard"}}, "guided_json", "BAD_GRAMMAR", "wizard"),
    ({"guided_regex": "(a"}, "guided_regex", "BAD_GRAMMAR", "unclosed"),
    ({"guided_grammar": "start: x"}, "guided_grammar", "BAD_GRAMMAR", "x"),
    ({"guided_regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "guided_regex", "BAD_GRAMMAR", "at most 65536"),
]


def test_what_is_no_grammar_is_refused_by_name(tmp_path):
    async def test(router, address):
        for fields, param, code, words in REFUSED:
            answer = await once(address, "POST", CHAT, {"messages": HI, **fields})
            assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, code), fields
            assert words in answer.error["message"]
        for fields in ({"ignore_eos": True}, {"min_tokens": 2}):
            answer = await once(address, "POST", CHAT, {"messages": HI, "guided_regex": "a", **fields})
            assert (answer.status, answer.error["code"]) == (422, "BAD_SAMPLING")
            assert answer.error["param"] in fields

    run_http(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)


def test_a_worker_without_grammars_is_named_and_nothing_is_sent_to_it(tmp_path):
    workers = [scripted_worker("prefill"), scripted_worker("decode", has_grammars=False)]

    async def test(router, address):
        answer = await once(address, "POST", CHAT, {"messages": HI, "guided_regex": "a"})
        assert (answer.status, answer.error["code"]) == (400, "BAD_GRAMMAR")
        assert workers[1].address in answer.error["message"]
        assert (await once(address, "POST", CHAT, {"messages": HI, "max_tokens": 2})).status == 200
        assert len(workers[1].starts) == 1

    run_http(tmp_path, workers, test)
