"""Answers of the demo model under grammars, through the hand-off: each parses and holds, whatever samples it."""

import json

import openai
import pytest
from headrace_client.cluster.local_cluster import LocalCluster

PEOPLE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "rain", "é"]}, "minItems": 1, "maxItems": 4},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PEOPLE}}
TURN = [{"role": "user", "content": "Tell me of a fox."}]


@pytest.fixture(scope="module")
def client(model_dir):
    options = {"kv-pool-mib": 64, "threads": 1}
    router = {"http-listen": "127.0.0.1:0", "model-name": "demo"}
    with (
        LocalCluster(model_dir, num_prefill=1, num_decode=1, worker_options=options, router_options=router) as cluster,
        openai.OpenAI(base_url=f"http://{cluster.router.http_address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def check(text):
    person = json.loads(text)
    assert set(person) == {"name", "age", "likes"}
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 12
    assert isinstance(person["age"], int)
    assert 0 <= person["age"] <= 120
    assert 1 <= len(person["likes"]) <= 4
    assert set(person["likes"]) <= {"tea", "rain", "é"}


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 5}, {"temperature": 1.8, "seed": 6}]
)
def test_every_answer_is_of_the_schema(client, sampling):
    asked = {"model": "demo", "messages": TURN, "response_format": FORMAT, "max_completion_tokens": 600, **sampling}
    whole = client.chat.completions.create(**asked, n=4)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content)
    pieces = [
        choice.delta.content or ""
        for event in client.chat.completions.create(**asked, stream=True)
        for choice in event.choices
    ]
    assert "".join(pieces) == whole.choices[0].message.content


def test_completions_of_several_kinds(client):
    asked = {"model": "demo", "prompt": ["Once", "The fox"], "max_tokens": 40, "temperature": 1.5, "seed": 1}
    for extra, fits in (
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}.__contains__),
        ({"guided_regex": "[0-9]{4}-[0-9]{2}"}, lambda text: len(text) == 7 and text[4] == "-"),
        ({"structured_outputs": {"grammar": 'start: "a" "b"+ "c"'}}, lambda text: set(text[1:-1]) == {"b"}),
    ):
        for choice in client.completions.create(**asked, extra_body=extra).choices:
            assert choice.finish_reason == "length" or fits(choice.text)


def test_log_probabilities_are_the_models_own(client):
    asked = {"model": "demo", "prompt": "Once", "max_tokens": 20, "temperature": 0, "logprobs": 3}
    (choice,) = client.completions.create(**asked, extra_body={"guided_regex": "[0-9]{5}"}).choices
    assert len(choice.text) == 5
    assert all(len(top) >= 3 for top in choice.logprobs.top_logprobs)
    assert min(choice.logprobs.token_logprobs[:-1]) < -1


def test_a_grammar_of_a_tool_that_is_none_is_refused_by_name(client):
    with pytest.raises(openai.BadRequestError, match="wizard") as raised:
        client.chat.completions.create(model="demo", messages=TURN, extra_body={"guided_json": {"type": "wizard"}})
    assert raised.value.code == "BAD_GRAMMAR"


ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "note": {"enum": ["x", '"}', "é"]}},
    "required": ["a", "note"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": ADD}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}},
]


def check_call(name, arguments):
    arguments = json.loads(arguments)
    assert (name, arguments) == ("stop", {}) or (
        name == "add" and set(arguments) == {"a", "note"} and 0 <= arguments["a"] <= 99
    )


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_calls_that_are_forced_fit_their_functions_whole_and_streamed(client, choice, sampling):
    asked = {
        "model": "demo", "messages": TURN, "tools": TOOLS, "tool_choice": choice, "max_completion_tokens": 500,
        "parallel_tool_calls": False, **sampling,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked, n=3)
    for each in whole.choices:
        assert (each.finish_reason, each.message.content) == ("tool_calls", None)
        (call,) = each.message.tool_calls
        check_call(call.function.name, call.function.arguments)
        assert choice == "required" or call.function.name == "add"
    name, arguments = "", ""
    for event in client.chat.completions.create(**asked, stream=True):
        for call in event.choices[0].delta.tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments
    call = whole.choices[0].message.tool_calls[0]
    assert (name, arguments) == (call.function.name, call.function.arguments)


def test_a_response_calls_and_goes_on_from_what_the_call_gave(client):
    tools = [{"type": "function", "strict": True, **tool["function"]} for tool in TOOLS]
    asked = {"model": "demo", "tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
    text = TURN[0]["content"]
    whole = client.responses.create(**asked, input=text, max_output_tokens=500)
    (call,) = whole.output
    assert (call.type, call.status) == ("function_call", "completed")
    check_call(call.name, call.arguments)
    with client.responses.stream(**asked, input=text, max_output_tokens=500) as stream:
        events = list(stream)
        (streamed,) = stream.get_final_response().output
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert (streamed.name, "".join(deltas)) == (call.name, call.arguments)
    gave = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    turns = [{"role": "user", "content": text}, call, gave]
    after = client.responses.create(model="demo", input=turns, max_output_tokens=8, temperature=0)
    assert (after.output[0].type, after.usage.output_tokens) == ("message", 8)
