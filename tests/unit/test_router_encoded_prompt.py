"""A prompt encoded once is, in every message and hash, what its ids would be one by one."""

import pytest
from headrace.v1 import decode_service_pb2
from headrace_core.request import hash_tokens
from headrace_router.requests import admission, encoded_prompt
from headrace_router.requests.encoded_prompt import EncodedPrompt
from headrace_router.testing import remembered, remembering_worker, run_router, text_request

PROMPTS = {
    "one": [0],
    "edges": [0, 127, 128, 16_383, 16_384, 2**21 - 1, 2**28, 2**32 - 1],
    "long": [i * 7 % 200_000 for i in range(126_000)],
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("output", [[], [5], [2**32 - 1, 0, 300]], ids=len)
def test_messages_and_hash_are_those_of_the_ids(prompt, output):
    encoded = EncodedPrompt(prompt)
    kind = decode_service_pb2.StartSequence
    for _ in range(2):  # nothing of the first message stays for the second
        message = kind(request_id="x", num_prompt_tokens=len(prompt), sample_index=3)
        encoded.put(message, output)
        expected = kind(request_id="x", num_prompt_tokens=len(prompt), sample_index=3, token_ids=[*prompt, *output])
        assert message == expected
        assert kind.FromString(message.SerializeToString()) == expected
    assert encoded.sha256(output) == hash_tokens([*prompt, *output])
    assert encoded.sha256([]) == hash_tokens(prompt)


def test_a_request_walks_its_prompt_once_for_all_its_samples_and_messages(tmp_path, monkeypatch):
    walks = []

    def words(token_ids):
        walks.append(len(token_ids))
        return real(token_ids)

    real = encoded_prompt.token_words
    monkeypatch.setattr(encoded_prompt, "token_words", words)
    made = []
    monkeypatch.setattr(admission, "EncodedPrompt", lambda ids: made.append(EncodedPrompt(ids)) or made[-1])

    async def test(router):
        samples = await router.generate(text_request("a" * 500, n=8, sampling={"max_tokens": 9}))
        assert [sample.token_ids for sample in samples] == [remembered("a" * 500, 9)] * 8
        assert len(made) == 1
        assert sorted(walks) == [0] * 8 + [501]

    run_router(tmp_path, [remembering_worker("prefill", num_pages=4096), remembering_worker("decode")], test)
