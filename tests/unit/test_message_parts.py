"""What a message costs is seen before it is decoded, and never more than there is."""

import random

import pytest
from headrace.v1 import generation_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace_core.message_parts import has_more_parts

DESCRIPTOR = pb.GenerateRequest.DESCRIPTOR
LIMIT = 100


def has_more(message: bytes, limit: int = LIMIT) -> bool:
    return has_more_parts(message, DESCRIPTOR, limit)


def chat(num_messages: int, **fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage(**fields)] * num_messages))


def sampling(**fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(sampling=types_pb2.SamplingParams(**fields))


MANY = 100 * LIMIT
HOSTILE = {
    "empty chat messages": chat(MANY),
    "short chat messages": chat(MANY, role="user", content="hi"),
    "stop strings": sampling(stop_strings=[""] * MANY),
    "stop ids": sampling(stop_token_ids=range(2 * MANY)),
    "biases": sampling(logit_bias=[types_pb2.LogitBias()] * MANY),
    "token ids": pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[1] * (2 * MANY))),
}
HONEST = {
    "a long text": pb.GenerateRequest(text=pb.TextPrompt(text="x" * (4 << 20))),
    "a long conversation": chat(LIMIT - 2, role="user", content="x" * 1000),
    "many token ids": pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=range(100 * LIMIT))),
    "a long message": chat(1, role="user", content="\x0a\x00" * (2 << 20)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_message_of_many_parts_is_seen(name):
    assert has_more(HOSTILE[name].SerializeToString())


@pytest.mark.parametrize("name", HONEST)
def test_a_large_message_of_few_parts_is_none(name):
    assert not has_more(HONEST[name].SerializeToString())


def test_parts_are_seen_however_they_are_written():
    empty_messages = b"\x0a\x00" * MANY
    size = pb.TextPrompt(text="x" * len(empty_messages)).SerializeToString()[1 : -len(empty_messages)]
    assert has_more(b"\x2a" + size + empty_messages)
    assert has_more(b"\x2a\x80\x80\x00".replace(b"\x80\x80\x00", size) + empty_messages)
    unpacked = b"\x08\x01" * MANY
    assert has_more(b"\x22" + size + unpacked)
    assert has_more(b"\x2a\x00" * MANY), "the same field again and again"
    assert has_more(b"\xf8\x07\x01" * MANY), "fields that nobody knows"


def test_the_count_is_exact_at_the_limit():
    message = chat(500, content="x" * 9).SerializeToString()
    assert not has_more(message, 501)
    assert has_more(message, 500)


def test_bytes_that_are_no_message_are_left_to_the_decoder():
    die = random.Random(3)
    whole = HOSTILE["short chat messages"].SerializeToString()
    for _ in range(300):
        has_more(die.randbytes(3000), 10)
        has_more(whole[: die.randrange(len(whole))], MANY)
    assert not has_more(b"\xff" * 100_000)
