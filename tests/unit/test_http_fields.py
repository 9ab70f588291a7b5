"""What docs/http.md and docs/errors.md say of HTTP is what the code does; and what bodies may be made of."""

import json
import re
import typing
from pathlib import Path

import openai.types.chat.chat_completion_stream_options_param as stream_options
import openai.types.chat.completion_create_params as chat
import openai.types.completion_create_params as completions
import openai.types.responses.response_create_params as responses
import pytest
from headrace_core.errors import InvalidRequestError
from headrace_core.reasons import REASONS
from headrace_router.face.http.errors import HttpError, status_of
from headrace_router.face.openai.openapi import document, table
from headrace_router.face.openai.parse import parse_body
from headrace_router.face.openai.request import read_chat, read_completion
from headrace_router.face.openai.responses_schema import NoStreamOptions, ResponsesRequest
from headrace_router.face.openai.schema import ChatRequest, CompletionRequest, Refused, StreamOptions

ROOT = Path(__file__).parents[2]
BASE = {CompletionRequest: {"prompt": "x"}, ChatRequest: {"messages": [{"role": "user", "content": "x"}]}}
READ = {CompletionRequest: read_completion, ChatRequest: read_chat}


def fields():
    for schema in BASE:
        for name, field in schema.model_fields.items():
            refused = any(isinstance(each, Refused) for each in field.metadata)
            yield pytest.param(schema, name, refused, id=f"{schema.__name__}.{name}")


def test_the_table_of_fields_is_the_schemas():
    page = (ROOT / "docs/http.md").read_text()
    told = page[page.index("| field |") :]
    assert told == table(), "python -m headrace_router.face.openai.openapi writes it"


@pytest.mark.parametrize(
    ("schema", "theirs"),
    [
        (CompletionRequest, completions.CompletionCreateParamsBase),
        (ChatRequest, chat.CompletionCreateParamsBase),
        (ResponsesRequest, responses.ResponseCreateParamsBase),
        (StreamOptions, stream_options.ChatCompletionStreamOptionsParam),
        (NoStreamOptions, responses.StreamOptions),
    ],
)
def test_every_field_of_openais_client_is_accepted_or_refused_with_what_to_do(schema, theirs):
    unknown = set(typing.get_type_hints(theirs)) - set(schema.model_fields)
    assert not unknown, "say in the schema whether they are served, and else what to do"


def test_the_table_of_statuses_is_the_codes():
    page = (ROOT / "docs/errors.md").read_text()
    rows = re.findall(r"^\| (\d{3}) \| ([A-Z_, ]+) \|$", page, re.M)
    told = {name: int(status) for status, names in rows for name in names.split(", ")}
    for error, reasons in REASONS.items():
        for reason in reasons:
            raised = error(reason, "x")
            assert status_of(raised) == told.get(reason, told.get(raised.status, 500)), reason


@pytest.mark.parametrize(("schema", "name", "refused"), list(fields()))
def test_every_field_passes_with_null_and_a_refused_one_with_nothing_else(schema, name, refused):
    if schema.model_fields[name].is_required() or name == "prompt":
        return
    if name not in ("model",):
        READ[schema](json.dumps({**BASE[schema], name: None}).encode(), "")
    if refused and name != "parallel_tool_calls":
        with pytest.raises(HttpError) as raised:
            READ[schema](json.dumps({**BASE[schema], name: {"x": 1}}).encode(), "")
        assert raised.value.param.split(".")[0] == name
        assert name in str(raised.value)


def test_the_description_has_every_field():
    schemas = document()["components"]["schemas"]
    for schema in BASE:
        assert set(schemas[schema.__name__]["properties"]) == set(schema.model_fields)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b"[]," * 100_000 + b"[]]}",
        b'{"prompt": [' + b'"",' * 200_000 + b'""]}',
        b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}",
        b'{"prompt": [' + b"7," * 3_000_000 + b"7]}",
    ],
    ids=["lists", "texts", "fields", "ids"],
)
def test_a_body_of_too_many_parts_is_refused_before_any_is_made(body, monkeypatch):
    monkeypatch.setattr(CompletionRequest, "model_validate_json", lambda *_: pytest.fail("they were made"))
    with pytest.raises(InvalidRequestError, match="more than") as raised:
        parse_body(CompletionRequest, body)
    assert raised.value.reason == "PROMPT_TOO_LONG"


@pytest.mark.parametrize("text", ['{[",' * 300_000, '\\"' * 300_000, '"' * 300_000])
def test_a_text_may_have_any_number_of_braces_and_quotes(text):
    assert parse_body(CompletionRequest, json.dumps({"prompt": text}).encode()).prompt == text


def test_a_million_ids_fit():
    assert len(parse_body(CompletionRequest, json.dumps({"prompt": [7] * 1_000_000}).encode()).prompt) == 1_000_000
