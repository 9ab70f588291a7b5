"""generation_config.json's sampling: what a request gets that says nothing; what can't be is refused by name."""

import json

import pytest
from headrace_client import SamplingParams as AskedParams
from headrace_client.codec import decode_server_info, encode_request
from headrace_core.errors import CheckpointError
from headrace_core.families.generation_config import read_sampling_defaults
from headrace_core.request import SamplingParams
from headrace_core.wire import decode_sampling, encode_sampling
from headrace_router.testing import remembering_worker, run_router, text_request, write_tokenizer

SAID = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}


def write(folder, said):
    folder.mkdir(exist_ok=True)
    text = said if isinstance(said, str) else json.dumps(said)
    (folder / "generation_config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (SAID, SAID),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"do_sample": False, "max_new_tokens": 3, "eos_token_id": 1}, {}),
        (dict.fromkeys(SAID), {}),
        ({}, {}),
    ],
)
def test_what_a_folder_says_of_sampling(said, expected, tmp_path):
    assert read_sampling_defaults(write(tmp_path, said)) == SamplingParams(**expected)


def test_a_folder_without_the_file_says_nothing(tmp_path):
    assert read_sampling_defaults(tmp_path) == SamplingParams()


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be in"),
        ({"temperature": "0.6"}, "temperature is '0.6'; it must be a number"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": [1.0]}, "repetition_penalty is"),
        ('{"temperature": NaN}', "temperature"),
    ],
)
def test_a_value_that_can_not_be_is_refused_by_file_and_field(said, says, tmp_path):
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{says}") as caught:
        read_sampling_defaults(write(tmp_path, said))
    assert caught.value.reason == "BAD_CONFIG"
    assert "--generation-config none" in str(caught.value)


def test_what_a_message_says_goes_before_what_the_model_says():
    message = encode_sampling(SamplingParams(temperature=1.0))
    message.ClearField("top_p")
    assert decode_sampling(message, SamplingParams(**SAID)) == SamplingParams(top_p=0.95)


def encoded(sampling):
    return encode_request("a", sampling, n=1, model="", request_id="", include_timings=False).sampling


def test_clients_send_what_they_were_told_and_no_defaults_of_their_own():
    for silent in (encoded(None), encoded(AskedParams(seed=1))):
        assert not any(silent.HasField(name) for name in SAID)
    told = encoded(AskedParams(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0))
    assert all(told.HasField(name) for name in SAID)
    assert decode_sampling(told, SamplingParams(**SAID)) == SamplingParams()


@pytest.mark.parametrize(
    ("option", "asked", "expected"),
    [
        ("auto", {}, SAID),
        ("auto", {"temperature": 1.0}, {**SAID, "temperature": 1.0}),
        ("none", {}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}),
    ],
)
def test_workers_are_told_what_the_model_says_and_so_is_who_asks_the_router(option, asked, expected, tmp_path):
    write_tokenizer(tmp_path / "tiny")
    write(tmp_path / "tiny", SAID)
    worker = remembering_worker("both")

    async def test(router):
        await router.generate(text_request("a prompt", sampling={"max_tokens": 2, **asked}))
        found = decode_sampling(worker.starts[0].sampling)
        assert {name: getattr(found, name) for name in SAID} == expected
        info = decode_server_info(await router.info())
        assert {**info.default_sampling, **asked} == expected

    run_router(tmp_path, [worker], test, generation_config=option)
