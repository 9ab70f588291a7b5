"""What a conversation's answer says besides text: thoughts and calls, whole and in pieces cut anywhere."""

import json

import pytest
from headrace_router.face.openai.said import ForcedCalls, Plain, Said, TaggedCalls, Thinking, joined
from headrace_router.testing import scripted_worker
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.http_parts import HERMES, THINKS, once, run_http, run_saying

PATH = "/v1/chat/completions"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "}\\"é"}}\n</tool_call>'
ARGUMENTS = {"a": 1, "b": '}"é'}


def thinking(*, has_begun=False, inner=Plain):
    return lambda: Thinking(inner(), has_begun=has_begun)


def calls(said):
    return [(call["function"]["name"], call["function"]["arguments"]) for call in joined(said.calls)]


# maker, text, content, reasoning, calls
CASES = {
    "no thoughts": (thinking(), "  Hi <think> there", "  Hi <think> there", "", []),
    "thoughts": (thinking(), "<think>\nHm.\nYes.\n</think>\n\nHi", "Hi", "Hm.\nYes.", []),
    "thoughts that the template began": (thinking(has_begun=True), "Hm.</think>Hi", "Hi", "Hm.", []),
    "thoughts without an end": (thinking(has_begun=True), "Hm. </thi", "", "Hm. </thi", []),
    "empty thoughts": (thinking(), "<think>\n\n</think>\n\nHi", "Hi", "", []),
    "half a mark": (thinking(), "<thin", "<thin", "", []),
    "two ends": (thinking(has_begun=True), "a</think>b</think>c", "b</think>c", "a", []),
    "a call": (TaggedCalls, f"Let me see.\n{CALL}", "Let me see.", "", [("add", ARGUMENTS)]),
    "two calls": (TaggedCalls, f"{CALL}\n{CALL}", "", "", [("add", ARGUMENTS)] * 2),
    "no call": (TaggedCalls, "<tool_call>x</tool_call> y", "<tool_call>x</tool_call> y", "", []),
    "a call that a stop cut": (TaggedCalls, CALL.removesuffix("</tool_call>"), "", "", [("add", ARGUMENTS)]),
    "half a call": (TaggedCalls, "<tool_call>{", "<tool_call>{", "", []),
    "thoughts, words and a call": (
        thinking(inner=TaggedCalls), f"<think>a</think>\n\nb\n{CALL}", "b", "a", [("add", ARGUMENTS)],
    ),
    "forced": (ForcedCalls, '[{"name":"add","arguments":{"a":1,"b":"}\\"é"}}]', "", "", [("add", ARGUMENTS)]),
    "two forced": (
        ForcedCalls,
        '[{"name":"f","arguments":{"a":[{"]":"\\\\"}]}},{"name":"g","arguments":{}}]',
        "", "", [("f", {"a": [{"]": "\\"}]}), ("g", {})],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=30)
@given(data=st.data())
def test_a_text_says_the_same_wherever_it_is_cut(case, data):
    make, text, content, reasoning, expected = CASES[case]
    reader, said, rest = make(), Said(), text
    while rest:
        count = data.draw(st.integers(1, len(rest)))
        said += reader.push(rest[:count])
        rest = rest[count:]
    said += reader.finish()
    assert (said.content, said.reasoning) == (content, reasoning)
    assert [(name, json.loads(arguments)) for name, arguments in calls(said)] == expected
    assert reader.num_calls == len(expected)


def test_what_is_certain_is_told_at_once():
    reader = thinking()()
    assert reader.push("<think>a") == Said(reasoning="a")
    assert reader.push("b<") == Said(reasoning="b")
    assert reader.push("/think>c") == Said(content="c")
    forced = ForcedCalls()
    forced.push('[{"name":"f","arguments":{"a')
    (delta,) = forced.push('":1').calls
    assert delta == {"index": 0, "function": {"arguments": '":1'}}


TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}}
    for name in ("add", "see")
]


def streamed(answer):
    """Return the one choice's content, reasoning and calls of a stream, and why it ended."""
    said, finish = Said(), None
    for event in answer.events[:-1]:
        (choice,) = event["choices"]
        delta = choice["delta"]
        said += Said(delta.get("content", ""), delta.get("reasoning_content", ""), delta.get("tool_calls", []))
        finish = choice["finish_reason"] or finish
    return said, finish


@pytest.mark.parametrize(
    ("text", "template", "fields", "message"),
    [
        (
            "<think>Hm.</think>\nHi", THINKS, {},
            {"content": "Hi", "reasoning_content": "Hm.", "calls": [], "finish": "stop"},
        ),
        (
            "Hm.</think>Hi", THINKS + "<think>", {},
            {"content": "Hi", "reasoning_content": "Hm.", "calls": [], "finish": "stop"},
        ),
        (
            CALL, HERMES, {"tools": TOOLS},
            {"content": None, "calls": [("add", json.dumps(ARGUMENTS, ensure_ascii=False))], "finish": "tool_calls"},
        ),
        (CALL, HERMES, {"tools": TOOLS, "tool_choice": "none"}, {"content": CALL, "calls": [], "finish": "stop"}),
        (
            '[{"name":"see","arguments":{"x":[1]}}]', THINKS, {"tools": TOOLS, "tool_choice": "required"},
            {"content": None, "calls": [("see", '{"x":[1]}')], "finish": "tool_calls"},
        ),
    ],
)  # fmt: skip
def test_thoughts_and_calls_stand_apart_whole_and_streamed(tmp_path, text, template, fields, message):
    async def test(router, address):
        body = {"messages": [{"role": "user", "content": "u"}], **fields}
        (choice,) = (await once(address, "POST", PATH, body)).json["choices"]
        told = choice["message"]
        assert told["content"] == message["content"]
        assert told.get("reasoning_content") == message.get("reasoning_content")
        found = [(each["function"]["name"], each["function"]["arguments"]) for each in told.get("tool_calls", [])]
        assert found == message["calls"]
        assert choice["finish_reason"] == message["finish"]
        said, finish = streamed(await once(address, "POST", PATH, {**body, "stream": True}))
        assert (said.content or None) == message["content"]
        assert said.reasoning == message.get("reasoning_content", "")
        assert calls(said) == message["calls"]
        assert finish == message["finish"]

    run_saying(tmp_path, text, test, template)


def test_an_answer_that_must_call_is_held_to_the_functions(tmp_path):
    number = {"$ref": "#/$defs/N"}
    parameters = {"type": "object", "properties": {"n": number}, "$defs": {"N": {"type": "integer"}}}
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": parameters}},
        {"type": "function", "function": {"name": "g"}},
    ]
    workers = [scripted_worker("prefill"), scripted_worker("decode")]

    async def test(router, address):
        for choice, names, most in (
            ("required", ["f", "g"], None),
            ({"type": "function", "function": {"name": "g"}}, ["g"], 1),
        ):
            body = {"messages": [{"role": "user", "content": "u"}], "tools": tools, "tool_choice": choice}
            assert (await once(address, "POST", PATH, {**body, "max_tokens": 3})).status == 200
            schema = json.loads(workers[1].starts[-1].sampling.grammar.json_schema)
            assert [each["properties"]["name"]["const"] for each in schema["items"]["anyOf"]] == names
            assert (schema["minItems"], schema.get("maxItems")) == (1, most)
            assert schema.get("$defs") == ({"N": {"type": "integer"}} if "f" in names else None)

    run_http(tmp_path, workers, test)


def function(**fields):
    return {"type": "function", "function": {"name": "f", **fields}}


REFUSED = [
    ({"tools": TOOLS}, "tool_choice", "no calls in a form that is known"),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice", "format"),
    ({"tool_choice": "required"}, "tool_choice", "needs `tools`"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x' is none"),
    ({"tools": TOOLS * 2, "tool_choice": "required"}, "tools", "one name"),
    ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls", "required"),
    ({"tools": [function(parameters={"type": "array"})], "tool_choice": "required"}, "tools", "type object"),
    ({"tools": [function(parameters={"properties": {"a": {"$ref": "#"}}})], "tool_choice": "required"}, "tools", "'#'"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "name"),
]


def test_tools_that_can_not_be_called_are_refused_by_name(tmp_path):
    async def test(router, address):
        for fields, param, words in REFUSED:
            answer = await once(address, "POST", PATH, {"messages": [{"role": "user", "content": "u"}], **fields})
            assert (answer.status, answer.error["param"]) == (400, param), fields
            assert words in answer.error["message"]

    run_http(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)
