"""Items of /v1/responses: a conversation of them understood, and answers told in them, whole and streamed alike."""

import json

import pytest
from headrace_router.face.openai.responses import read_response
from headrace_router.testing import scripted_worker
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.unit.http_parts import HERMES, THINKS, once, run_http, run_saying

PATH = "/v1/responses"
EVENT = TypeAdapter(ResponseStreamEvent)
TOOLS = [
    {"type": "function", "name": name, "parameters": {"type": "object"}, "strict": True} for name in ("add", "see")
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>'
FORCED = '[{"name":"see","arguments":{"x":[1]}},{"name":"add","arguments":{}}]'
SEEN = [("function_call", "completed", "see", '{"x":[1]}'), ("function_call", "completed", "add", "{}")]
CUT = ("function_call", "incomplete", "see", '{"x":')
ADDED = ("function_call", "completed", "add", '{"a": "é"}')


def told(item):
    """Return an item without its ids."""
    if item["type"] == "function_call":
        assert item["id"].removeprefix("fc_") == item["call_id"].removeprefix("call_")
        return item["type"], item["status"], item["name"], item["arguments"]
    (part,) = item["content"]
    return item["type"], item["status"], part["text"]


def check_fields(response):
    """Check a response against OpenAI's type, but for what is not known here."""
    usage = response["usage"]
    if usage is not None:
        usage = {**usage, "input_tokens_details": {**usage["input_tokens_details"], "cache_write_tokens": 0}}
    Response.model_validate({**response, "usage": usage}, strict=True)


def followed(events):
    """Return the items that a stream's events make, checking their order and every field against OpenAI's types."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    items, texts, done = {}, {}, {}
    for event in events:
        if "response" in event:
            check_fields(event["response"])
        else:
            assert EVENT.validate_python(event, strict=True).type == event["type"]
        at = event.get("output_index")
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert at == len(items)
                assert all(each in done or items[each]["type"] == "message" for each in items)
                assert event["item"]["status"] == "in_progress"
                items[at], texts[at] = event["item"], ""
            case "output_text.delta" | "reasoning_text.delta" | "function_call_arguments.delta":
                assert event["item_id"] == items[at]["id"]
                assert at not in done
                texts[at] += event["delta"]
            case "output_text.done" | "reasoning_text.done":
                assert event["text"] == texts[at]
            case "function_call_arguments.done":
                assert event["arguments"] == texts[at]
            case "output_item.done":
                assert at not in done
                assert event["item"]["id"] == items[at]["id"]
                assert told(event["item"])[-1] == texts[at]
                done[at] = event["item"]
    assert events[-1]["response"]["output"] == [done[at] for at in sorted(items)]
    return events[-1]["response"]


@pytest.mark.parametrize(
    ("text", "template", "fields", "items"),
    [
        ("Hi", HERMES, {}, [("message", "completed", "Hi")]),
        ("", HERMES, {}, [("message", "completed", "")]),
        (CALL, HERMES, {"tools": TOOLS}, [ADDED]),
        (f"Hm.\n{CALL}\n{CALL}", HERMES, {"tools": TOOLS}, [("message", "completed", "Hm."), ADDED, ADDED]),
        (CALL, HERMES, {"tools": TOOLS, "tool_choice": "none"}, [("message", "completed", CALL)]),
        (FORCED, THINKS, {"tools": TOOLS, "tool_choice": "required"}, SEEN),
        ("<think>Hm.</think>\nHi", THINKS, {}, [("reasoning", "completed", "Hm."), ("message", "completed", "Hi")]),
        (
            f"<think>{CALL}?</think>\n{CALL}", THINKS + HERMES, {"tools": TOOLS},
            [("reasoning", "completed", f"{CALL}?"), ADDED],
        ),
        (FORCED, THINKS, {"tools": TOOLS, "tool_choice": "required", "max_output_tokens": 32}, [CUT]),
        ("<think>Hm.", THINKS, {"max_output_tokens": 9}, [("reasoning", "incomplete", "Hm")]),
    ],
)  # fmt: skip
def test_an_answer_is_told_in_items_whole_and_streamed(tmp_path, text, template, fields, items):
    async def test(router, address):
        body = {"input": "u", **fields}
        whole = (await once(address, "POST", PATH, body)).json
        assert [told(item) for item in whole["output"]] == items
        is_cut = items[-1][1] == "incomplete"
        assert whole["status"] == ("incomplete" if is_cut else "completed")
        check_fields(whole)
        streamed = followed((await once(address, "POST", PATH, {**body, "stream": True})).events)
        assert [told(item) for item in streamed["output"]] == items
        assert streamed["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
        thoughts = whole["usage"]["output_tokens_details"]["reasoning_tokens"]
        assert (thoughts > 0) == (items[0][0] == "reasoning")
        assert thoughts <= whole["usage"]["output_tokens"]

    run_saying(tmp_path, text, test, template)


def test_what_was_asked_of_tools_is_repeated_and_workers_are_told(tmp_path):
    workers = [scripted_worker("prefill"), scripted_worker("decode")]
    named = {"type": "function", "name": "see"}

    async def test(router, address):
        body = {"input": "u", "tools": TOOLS, "tool_choice": named, "max_output_tokens": 3}
        found = (await once(address, "POST", PATH, body)).json
        assert (found["tool_choice"], found["parallel_tool_calls"]) == (named, True)
        assert found["tools"] == [{"description": None, **tool} for tool in TOOLS]
        schema = json.loads(workers[1].starts[-1].sampling.grammar.json_schema)
        assert [each["properties"]["name"]["const"] for each in schema["items"]["anyOf"]] == ["see"]
        assert schema["maxItems"] == 1

    run_http(tmp_path, workers, test)


def read(**fields):
    return read_response(json.dumps({"input": "u", **fields}).encode(), "").messages[0].chat


USER = {"role": "user", "content": "u"}
THOUGHT = {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
SAID = {"type": "message", "id": "m", "role": "assistant", "content": [{"type": "output_text", "text": "t"}]}
CALLED = {
    "type": "function_call",
    "id": "f",
    "call_id": "c1",
    "name": "add",
    "arguments": '{"a":1}',
    "status": "completed",
}
CALLED_2 = {**CALLED, "call_id": "c2"}
GAVE = {"type": "function_call_output", "call_id": "c1", "output": "7"}
GAVE_2 = {**GAVE, "call_id": "c2", "output": [{"type": "input_text", "text": "8"}]}


def call_of(call_id):
    return {"id": call_id, "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


TOLD_USER = ("user", "u", {})
TOLD_GAVE = ("tool", "7", {"tool_call_id": "c1"})


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        (
            [USER, CALLED, GAVE],
            [TOLD_USER, ("assistant", "", {"content": None, "tool_calls": [call_of("c1")]}), TOLD_GAVE],
        ),
        (
            [USER, THOUGHT, SAID, CALLED, CALLED_2, GAVE, GAVE_2],
            [
                TOLD_USER,
                ("assistant", "t", {"reasoning_content": "Hm.", "tool_calls": [call_of("c1"), call_of("c2")]}),
                TOLD_GAVE,
                ("tool", "8", {"tool_call_id": "c2"}),
            ],
        ),
        (
            [USER, CALLED, GAVE, CALLED_2, GAVE_2, SAID, USER],
            [
                TOLD_USER,
                ("assistant", "", {"content": None, "tool_calls": [call_of("c1")]}),
                TOLD_GAVE,
                ("assistant", "", {"content": None, "tool_calls": [call_of("c2")]}),
                ("tool", "8", {"tool_call_id": "c2"}),
                ("assistant", "t", {}),
                TOLD_USER,
            ],
        ),
        ([USER, SAID, THOUGHT, CALLED, GAVE], [
            TOLD_USER, ("assistant", "t", {}),
            ("assistant", "", {"content": None, "reasoning_content": "Hm.", "tool_calls": [call_of("c1")]}), TOLD_GAVE,
        ]),
        ([USER, THOUGHT, USER], [TOLD_USER, TOLD_USER]),
    ],
)  # fmt: skip
def test_what_a_model_did_in_one_turn_is_one_message(items, messages):
    found = [(each.role, each.content, json.loads(each.fields_json or "{}")) for each in read(input=items).messages]
    assert found == messages


def test_templates_are_told_the_tools_as_chat_tells_them():
    (add, _) = map(json.loads, read(tools=TOOLS).tools_json)
    function = {"name": "add", "parameters": {"type": "object"}, "strict": True}
    assert add == {"type": "function", "function": function}


REFUSED = [
    ({"tools": TOOLS}, "tool_choice", "no calls in a form that is known"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name", "missing"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "'x' is none"),
    ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice", "a named function"),
    ({"tools": TOOLS, "tool_choice": "required", "text": {"format": {"type": "json_object"}}}, "tool_choice", "format"),
    ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls", "required"),
    ({"max_tool_calls": 2}, "max_tool_calls", "not served"),
    ({"input": [GAVE]}, "input.0.call_id", "no `function_call` before it"),
    ({"input": [{**CALLED, "arguments": "[1]"}]}, "input.0.arguments", "JSON object"),
    ({"input": [USER, {"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.1.call_id", "missing"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "one of message, reasoning, function_call,"),
    ({"input": [5]}, "input.0", "an object"),
    ({"input": 5}, "input", "a conversation"),
    ({"input": [{**CALLED, "colour": 1}]}, "input.0.colour", "no field"),
    ({"input": [{**THOUGHT, "encrypted_content": "x"}]}, "input.0.encrypted_content", "nothing is kept"),
]


def test_items_and_tools_that_can_not_be_are_refused_by_name(tmp_path):
    async def test(router, address):
        for fields, param, words in REFUSED:
            answer = await once(address, "POST", PATH, {"input": "u", **fields})
            assert (answer.status, answer.error["param"]) == (400, param), fields
            assert words in answer.error["message"]

    run_http(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)
