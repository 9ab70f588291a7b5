"""The real openai client against a real cluster: what it gets is what gRPC's clients get."""

import openai
import pytest
from headrace_client import Client, SamplingParams
from headrace_client.cluster.local_cluster import LocalCluster

PROMPT = "Once upon a time there was a little fox named Zorvim."
TURN = [{"role": "user", "content": "Tell me a story about a fox."}]
EXTRA = {"return_token_ids": True}


@pytest.fixture(scope="module")
def cluster(model_dir):
    options = {"kv-pool-mib": 64, "threads": 1}
    router = {"http-listen": "127.0.0.1:0", "model-name": "demo"}
    with LocalCluster(model_dir, num_prefill=1, num_decode=1, worker_options=options, router_options=router) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster):
    url = f"http://{cluster.router.http_address}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def over_grpc(cluster):
    """The same prompt's greedy answer, by the other face."""
    with Client(cluster.router_address) as client:
        return client.generate(PROMPT, SamplingParams(max_tokens=24, temperature=0.0))


def test_completions_are_those_of_grpc_streamed_and_not(client, over_grpc):
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked, extra_body=EXTRA)
    (choice,) = whole.choices
    assert choice.text == over_grpc.text
    assert choice.token_ids == list(over_grpc.token_ids)
    assert choice.finish_reason == "length"
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (24, 24 + whole.usage.prompt_tokens)
    pieces, ids = [], []
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True}, extra_body=EXTRA)
    for event in stream:
        pieces += [choice.text for choice in event.choices]
        ids += [each for choice in event.choices for each in choice.token_ids]
    assert "".join(pieces) == over_grpc.text
    assert ids == list(over_grpc.token_ids)
    assert len(pieces) > 10
    assert event.usage.completion_tokens == 24
    assert event.usage.prompt_tokens_details.cached_tokens <= whole.usage.prompt_tokens


def test_conversations_streamed_and_not(client):
    asked = {"model": "demo", "messages": TURN, "max_completion_tokens": 24, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    streamed = "".join(
        each.delta.content or ""
        for event in client.chat.completions.create(**asked, stream=True)
        for each in event.choices
    )
    assert streamed == choice.message.content


def test_log_probabilities_have_the_tokens_texts_the_first_included(client, over_grpc):
    chat = client.chat.completions.create(
        model="demo", messages=TURN, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens == 8
    assert b"".join(bytes(each.bytes) for each in content).decode() == chat.choices[0].message.content
    for each in content:
        assert len(each.top_logprobs) == 3
        assert each.logprob == each.top_logprobs[0].logprob <= 0
        assert each.token == each.top_logprobs[0].token
    completion = client.completions.create(model="demo", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=2)
    found = completion.choices[0].logprobs
    assert "".join(found.tokens) == completion.choices[0].text
    assert found.text_offset == [sum(map(len, found.tokens[:index])) for index in range(8)]
    assert [len(each) for each in found.top_logprobs] == [2] * 8


def test_samples_stop_strings_and_echo(client, over_grpc):
    seeded = {"model": "demo", "prompt": PROMPT, "max_tokens": 16, "n": 3, "seed": 7, "temperature": 1.0}
    first, again = (client.completions.create(**seeded) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.text for choice in again.choices]
    stop = over_grpc.text.split()[3]
    stopped = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0, stop=stop, echo=True)
    (choice,) = stopped.choices
    assert choice.text == PROMPT + over_grpc.text[: over_grpc.text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_a_prompts_log_probabilities_alone_are_those_of_its_tokens(client):
    asked = {"model": "demo", "prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": 0}
    whole = client.completions.create(**asked, extra_body=EXTRA)
    (choice,) = whole.choices
    found, num_tokens = choice.logprobs, whole.usage.prompt_tokens
    assert (choice.text, choice.finish_reason, whole.usage.completion_tokens) == (PROMPT, "length", 0)
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == num_tokens
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    assert all(each <= 0 for each in found.token_logprobs[1:])
    for logprob, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert len(top) in (2, 3)
        assert max(top.values()) >= logprob
    assert all(PROMPT[at:].startswith(text) for at, text in zip(found.text_offset[1:], found.tokens[1:], strict=True))
    streamed = [each for event in client.completions.create(**asked, stream=True) for each in event.choices]
    assert "".join(each.text for each in streamed) == PROMPT
    parts = [each.logprobs for each in streamed if each.logprobs]
    assert [value for part in parts for value in part.token_logprobs] == found.token_logprobs
    over = {**asked, "max_tokens": 1, "logprobs": None, "echo": None}
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        client.completions.create(**{**over, "max_tokens": 0})
    assert raised.value.param == "max_tokens"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "headrace"


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tool_choice"),
        ({"temperature": -1}, openai.UnprocessableEntityError, "temperature"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "colour"),
        ({"timeout": 0.001}, openai.APITimeoutError, None),
    ],
)
def test_errors_are_the_clients_own(client, fields, error, param):
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": "demo", "messages": TURN, "max_tokens": 4, **fields})
    assert getattr(raised.value, "param", None) == param


def test_a_stream_that_is_left_frees_its_place(cluster, client):
    stream = client.completions.create(model="demo", prompt=PROMPT, max_tokens=2000, stream=True)
    next(iter(stream))
    stream.close()
    with Client(cluster.router_address) as watching:
        while watching.server_info().num_running:
            pass


def test_a_request_keeps_the_name_it_came_with(client):
    raw = client.completions.with_raw_response.create(
        model="demo", prompt=PROMPT, max_tokens=1, extra_headers={"x-request-id": "mine-7"}
    )
    assert raw.headers["x-request-id"] == "mine-7"
    assert raw.parse().id == "cmpl-mine-7"


def test_responses_streamed_and_not_are_the_conversations(client):
    chat = client.chat.completions.create(model="demo", messages=TURN, max_tokens=24, temperature=0)
    asked = {"model": "demo", "input": TURN[0]["content"], "max_output_tokens": 24, "temperature": 0}
    whole = client.responses.create(**asked)
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage.total_tokens == chat.usage.total_tokens
    events = list(client.responses.create(**asked, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert events[-1].response.status == whole.status
