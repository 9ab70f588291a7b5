"""Log-probabilities of prompts over HTTP and gRPC, from workers whose answers are known."""

import pytest
from headrace.v1 import types_pb2
from headrace_core.errors import HandoffLostError, InvalidRequestError, ProtocolError
from headrace_router.requests.prompt_scores import PromptScores
from headrace_router.testing import BOS, remembering_worker, run_router, scripted_worker, text_request

from tests.unit.http_parts import once, run_http

PROMPT = "wörter und mehr"
IDS = [BOS, *PROMPT.encode()]
"""With a character of two tokens."""


def said_of(place, rank=0):
    """What fake workers say: of the token at `place`; with `rank`, (token, log-probability) of others there."""
    return ((IDS[place] + rank - 1) % 256, -0.25 - (rank - 1)) if rank else -0.5 - place % 7


def workers():
    return [scripted_worker("prefill"), scripted_worker("decode")]


def texts(ids):
    return [bytes([each]).decode("utf-8", "replace") if each < BOS else "<bos>" for each in ids]


def check_logprobs(found, num_tops, num_output):
    """`logprobs` of a completion that echoes, and has `num_output` tokens more."""
    num = len(IDS)
    assert {len(values) for values in found.values()} == {num + num_output}
    assert found["tokens"][:num] == texts(IDS)
    assert found["token_logprobs"][:num] == [None, *(said_of(place) for place in range(1, num))]
    assert found["top_logprobs"][0] is None
    for place in range(1, num):
        others = [said_of(place, rank) for rank in range(1, num_tops + 1)]
        expected = {texts([IDS[place]])[0]: said_of(place)} | {texts([token])[0]: value for token, value in others}
        assert found["top_logprobs"][place] == pytest.approx(expected)
    # Of a special token, which the text does not show, the next has the place.
    offsets = [0, *(sum(map(len, found["tokens"][1:index])) for index in range(1, num + num_output))]
    assert found["text_offset"] == offsets


@pytest.mark.parametrize(("max_tokens", "num_tops"), [(0, 2), (1, 0), (6, 3)])
def test_a_completion_that_echoes_has_the_prompts_logprobs(tmp_path, max_tokens, num_tops):
    asked = {"prompt": PROMPT, "echo": True, "logprobs": num_tops, "max_tokens": max_tokens, "temperature": 0}

    async def test(router, address):
        whole = (await once(address, "POST", "/v1/completions", asked)).json
        (choice,) = whole["choices"]
        answer = choice["text"].removeprefix(PROMPT)
        assert (choice["text"].startswith(PROMPT), choice["finish_reason"]) == (True, "length")
        assert whole["usage"]["completion_tokens"] == max_tokens
        assert bool(answer) == bool(max_tokens)
        check_logprobs(choice["logprobs"], num_tops, max_tokens)

        stream = await once(address, "POST", "/v1/completions", asked | {"stream": True})
        assert stream.text == {0: choice["text"]}
        parts = [each["logprobs"] for event in stream.events[:-1] for each in event["choices"] if each["logprobs"]]
        assert len(parts) > 2
        joined = {name: [value for part in parts for value in part[name]] for name in parts[0]}
        assert joined == choice["logprobs"]

    run_http(tmp_path, workers(), test)


def test_as_lm_evaluation_harness_asks(tmp_path):
    """Token ids of several prompts, one token each, what follows the last of them cut off."""
    prompts = [IDS, IDS[:1], IDS[:9]]
    asked = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "seed": 1234, "temperature": 0}

    async def test(router, address):
        answer = (await once(address, "POST", "/v1/completions", asked)).json
        for ids, choice in zip(prompts, sorted(answer["choices"], key=lambda each: each["index"]), strict=True):
            found = choice["logprobs"]["token_logprobs"][:-1]
            assert found == [None, *(said_of(place) for place in range(1, len(ids)))]
            assert len(choice["logprobs"]["top_logprobs"]) == len(ids) + 1

    run_http(tmp_path, workers(), test)


def test_vllms_prompt_logprobs_of_completions_and_conversations(tmp_path):
    async def test(router, address):
        asked = {"prompt": PROMPT, "prompt_logprobs": 2, "max_tokens": 1}
        choice = (await once(address, "POST", "/v1/completions", asked)).json["choices"][0]
        assert choice["logprobs"] is None
        first, *others = choice["prompt_logprobs"]
        assert first is None
        assert len(others) == len(IDS) - 1
        for place, entry in enumerate(others, start=1):
            own, (second, value) = IDS[place], said_of(place, 2)
            # Fake workers name the token itself first.
            assert entry[str(own)] == {"logprob": -0.25, "rank": 1, "decoded_token": texts([own])[0]}
            assert entry[str(second)] == {"logprob": value, "rank": 2, "decoded_token": texts([second])[0]}
        asked = {"messages": [{"role": "user", "content": "ab"}], "prompt_logprobs": 0, "max_tokens": 1}
        answer = (await once(address, "POST", "/v1/chat/completions", asked)).json
        assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
        assert answer["prompt_logprobs"][1].values()

    run_http(tmp_path, workers(), test)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"echo": True, "logprobs": 1, "n": 2}, "n", "must be 1"),
        ({"prompt_logprobs": 1, "n": 2}, "n", "must be 1"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        ({"prompt_logprobs": 1, "echo": True, "logprobs": 1}, "prompt_logprobs", "echo"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "prompt_logprobs is 21"),
        ({"echo": True, "max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({"echo": True, "logprobs": 21, "max_tokens": 0}, "logprobs", "logprobs is 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "prompt_logprobs"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path, fields, param, says):
    async def test(router, address):
        answer = await once(address, "POST", "/v1/completions", {"prompt": PROMPT, **fields})
        assert answer.status in (400, 422)
        assert answer.error["param"] == param
        assert says in answer.error["message"]

    run_http(tmp_path, workers(), test)


def collect(messages):
    said = [each.prompt_logprobs for each in messages if each.HasField("prompt_logprobs")]
    return [(each.first_position + i, value) for each in said for i, value in enumerate(each.logprobs)]


async def asked_over_grpc(router, **sampling):
    request = text_request(PROMPT, sampling={"max_tokens": 3, "temperature": 0.0, **sampling})
    return [message async for message in router.stub.Generate(request, timeout=30)]


EVERY = [(place, said_of(place)) for place in range(1, len(IDS))]


def test_grpc_says_each_once_and_what_tokens_stand_for_also_after_a_new_attempt(tmp_path):
    """What was told already is not asked for again, and when all is told the next attempt asks for none."""

    async def test(router):
        decode = router.workers[1]
        messages = await asked_over_grpc(router, prompt_logprobs=1)
        assert collect(messages) == EVERY
        first = messages[0].prompt_logprobs
        assert (first.token_ids[0], first.tokens[0], first.top_tokens[0]) == (IDS[1], b"w", b"w")
        expected = [token for message in messages for token in message.token_ids]
        decode.faults.scored.append(HandoffLostError("HOLDER_LOST", "halfway"))
        decode.faults.sequence.append((1, HandoffLostError("HOLDER_LOST", "then")))
        decode.starts.clear()
        again = await asked_over_grpc(router, prompt_logprobs=1)
        assert collect(again) == EVERY
        assert [token for message in again for token in message.token_ids] == expected
        assert [each.num_prompt_logprobs for each in decode.starts][:2] == [0, 5]
        assert [each.sampling.HasField("prompt_logprobs") for each in decode.starts] == [True, True, False]

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test, max_attempts=5)


@pytest.mark.parametrize("lie", ["gap", "more", "rank", "nan", "parts", "early"])
def test_a_worker_that_says_nonsense_of_a_prompt_costs_the_attempt(tmp_path, monkeypatch, lie):
    """The next one is right; nothing of the nonsense reaches the client."""

    def wrong(message):
        said = message.prompt_logprobs
        if lie == "gap":
            said.first_position += 1
        elif lie == "more":
            said.first_position = len(IDS) - 2
        elif lie == "rank":
            said.ranks[0] = 0
        elif lie == "nan":
            said.logprobs[0] = float("nan")
        elif lie == "parts":
            del said.top_token_ids[-1]

    async def test(router):
        decode = router.workers[1]
        emit, left = decode.emit, [1]

        def lying(router_id, entries):
            for entry in entries:
                if left[0] and entry.WhichOneof("event") == "prompt_logprobs":
                    left[0] = 0
                    if lie == "early":
                        entry.tokens.token_ids.append(7)
                    else:
                        wrong(entry)
            emit(router_id, entries)

        monkeypatch.setattr(decode, "emit", lying)
        assert collect(await asked_over_grpc(router, prompt_logprobs=1)) == EVERY
        assert not left[0]
        assert len(decode.starts) == 2

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test, max_attempts=3)


def test_how_many_there_may_be_is_bounded_for_a_request_and_for_all(tmp_path, monkeypatch):
    async def test(router):
        monkeypatch.setattr("headrace_router.router.MOST_PROMPT_LOGPROBS", 2 * len(IDS))
        assert len(collect(await asked_over_grpc(router, prompt_logprobs=1))) == len(IDS) - 1
        refused = await router.refused(text_request(PROMPT, sampling={"prompt_logprobs": 2}))
        assert refused.reason == "QUEUE_FULL"
        assert len(collect(await asked_over_grpc(router, prompt_logprobs=1))) == len(IDS) - 1  # nothing leaked
        monkeypatch.setattr("headrace_core.request.MAX_PROMPT_LOGPROBS", len(IDS))
        refused = await router.refused(text_request(PROMPT, sampling={"prompt_logprobs": 1}))
        assert isinstance(refused, InvalidRequestError)
        assert refused.reason == "BAD_SAMPLING"

    run_router(tmp_path, workers(), test)


def test_what_is_no_news_is_dropped():
    class Spec:
        prompt_ids = IDS
        params = types_pb2.SamplingParams(prompt_logprobs=0)

    class Unsent:
        taken = 0

        def add_prompt_logprobs(self, said):
            self.taken += 1

    unsent = Unsent()
    scores = PromptScores(Spec, unsent)
    part = types_pb2.PromptLogprobs(first_position=1, logprobs=[-1, -2], ranks=[1, 1])
    assert scores.take(part)
    assert not scores.take(part)
    with pytest.raises(ProtocolError, match="2 are known"):
        scores.take(types_pb2.PromptLogprobs(first_position=4, logprobs=[-1], ranks=[1]))
    assert (unsent.taken, scores.is_whole) == (1, False)
