"""What callers pass: what is meant is taken, whatever its type; all else is a HeadraceError that names it."""

from __future__ import annotations

import array
import decimal
from typing import Any

import numpy as np
import pytest
import torch
from headrace_client.arguments import timeout_of
from headrace_client.codec import encode_request
from headrace_client.results import ChatMessage
from headrace_client.service_level import ServiceLevel
from headrace_core.errors import InvalidRequestError
from headrace_core.request import Grammar, GrammarKind, SamplingParams


def encoded(prompt: Any = "a", *, n: Any = 1, model: Any = "", request_id: Any = "", **sampling: Any):
    params = SamplingParams(**sampling) if sampling else None
    return encode_request(prompt, params, n=n, model=model, request_id=request_id, include_timings=False)


def refusal(**arguments: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        encoded(**arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    return caught.value


@pytest.mark.parametrize(
    "prompt",
    [
        [3, 1, 2],
        (3, 1, 2),
        np.array([3, 1, 2]),
        np.array([3, 1, 2], dtype=np.uint16),
        [np.int64(3), 1, 2],
        torch.tensor([3, 1, 2]),
        list(torch.tensor([3, 1, 2])),
        array.array("i", [3, 1, 2]),
        (each for each in (3, 1, 2)),
        dict.fromkeys((3, 1, 2)).keys(),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_token_ids_of_any_type_are_token_ids(prompt):
    assert list(encoded(prompt).tokens.token_ids) == [3, 1, 2]


def test_messages_may_be_mappings():
    message = {"role": "user", "content": "hi"}
    chat = encoded([message, ChatMessage("assistant", "ho"), message]).chat
    assert [(each.role, each.content) for each in chat.messages] == [
        ("user", "hi"), ("assistant", "ho"), ("user", "hi"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "reason", "words"),
    [
        ("", "EMPTY_PROMPT", "empty"),
        ([], "EMPTY_PROMPT", "empty"),
        (np.array([], dtype=int), "EMPTY_PROMPT", "empty"),
        (None, "BAD_REQUEST", "the prompt is None"),
        (b"hello", "BAD_REQUEST", r"of type bytes; it must be text, token ids or messages; .*decode"),
        (bytearray(b"hello"), "BAD_REQUEST", "bytearray"),
        (5, "BAD_REQUEST", "the prompt is 5, of type int"),
        ({"role": "user", "content": "hi"}, "BAD_REQUEST", "of type dict; it must be .*a list of messages"),
        (ChatMessage("user", "hi"), "BAD_REQUEST", "a list of messages"),
        (["a", "b"], "BAD_REQUEST", "part 0 of the prompt is 'a'.*each of several texts"),
        ([1, "b"], "BAD_REQUEST", "part 1 of the prompt is 'b', of type str; it must be a token id"),
        ([1.0], "BAD_REQUEST", "part 0 of the prompt is 1.0, of type float"),
        ([True], "BAD_REQUEST", "part 0 of the prompt is True"),
        ([None], "BAD_REQUEST", "part 0 of the prompt is None"),
        (np.array([1.0, 2.0]), "BAD_REQUEST", "of type float"),
        (np.array([[1, 2]]), "BAD_REQUEST", r"part 0 of the prompt is \[1, 2\], of type list"),
        ([1, ChatMessage("user", "hi")], "BAD_REQUEST", "part 1 of the prompt"),
        ([ChatMessage("user", "hi"), 1], "BAD_REQUEST", "part 1 of the prompt is 1, of type int; it must be a message"),
        ([{"role": "user"}], "BAD_REQUEST", "a role and a content that are text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "BAD_REQUEST", "content that are text"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "BAD_REQUEST", "without tool_call_id"),
        ([-1], "BAD_TOKEN", "token id"),
        ([2**40], "BAD_TOKEN", "token id"),
        ([np.zeros(100_000)], "BAD_REQUEST", "part 0 of the prompt"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(prompt, reason, words):
    error = refusal(prompt=prompt)
    assert error.reason == reason
    with pytest.raises(InvalidRequestError, match=words):
        raise error


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("stop_strings", "the", ("the",)),
        ("stop_strings", ["a", "b"], ("a", "b")),
        ("stop_strings", None, ()),
        ("stop_token_ids", 7, (7,)),
        ("stop_token_ids", np.array([7, 8]), (7, 8)),
        ("stop_token_ids", {7}, (7,)),
        ("temperature", 1, 1.0),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", decimal.Decimal("0.5"), 0.5),
        ("top_p", torch.tensor(0.5), 0.5),
        ("top_k", np.int64(4), 4),
        ("max_tokens", torch.tensor(4), 4),
        ("max_tokens", None, None),
        ("ignore_eos", np.bool_(True), True),
        ("ignore_eos", None, False),
        ("logit_bias", {np.int64(3): 1}, {3: 1.0}),
        ("logit_bias", None, {}),
        ("grammar", {"regex": "a+"}, Grammar(GrammarKind.REGEX, "a+")),
        ("grammar", None, None),
    ],
)
def test_a_parameter_of_another_type_is_what_is_meant(name, given, meant):
    assert encoded(**{name: given}).sampling == encoded(**{name: meant}).sampling


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("stop_strings", b"the"),
        ("stop_strings", 3),
        ("stop_strings", [b"the"]),
        ("stop_strings", [None]),
        ("stop_strings", ["\ud800"]),
        ("stop_token_ids", "the"),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", [2**40]),
        ("temperature", "0.7"),
        ("temperature", b"1"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("temperature", [0.7]),
        ("temperature", {}),
        ("temperature", 1j),
        ("max_tokens", 1.0),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_tokens", 2**40),
        ("top_k", 1e3),
        ("seed", "7"),
        ("seed", -1),
        ("seed", 2**64),
        ("min_tokens", [1]),
        ("top_logprobs", True),
        ("ignore_eos", 1),
        ("ignore_eos", "yes"),
        ("logit_bias", [(1, 2)]),
        ("logit_bias", {"50": 1}),
        ("logit_bias", {1: "2"}),
        ("logit_bias", {1.5: 2}),
        ("grammar", "a+"),
        ("grammar", {"regex": 1}),
        ("grammar", {"yacc": "a"}),
        ("grammar", {"regex": "a", "lark": "b"}),
    ],
)
def test_a_parameter_that_means_nothing_is_refused_by_name(name, given):
    error = refusal(**{name: given})
    assert error.reason in ("BAD_SAMPLING", "BAD_REQUEST", "BAD_TOKEN")
    assert name in str(error) or "sampling parameter" in str(error)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": "2"}, {"n": 1.5}, {"n": None}, {"n": True}, {"n": 0}, {"n": 2**40}, {"model": 3}, {"model": "\ud800"},
        {"request_id": 7}, {"request_id": b"a"}, {"request_id": "a b"},
    ],
)  # fmt: skip
def test_what_else_is_of_no_use_is_refused_by_name(arguments):
    error = refusal(**arguments)
    assert error.reason == "BAD_REQUEST"
    assert next(iter(arguments)) in str(error)


@pytest.mark.parametrize(
    ("level", "words"),
    [
        ("interactive", "service_level is 'interactive', of type str; it must be a ServiceLevel"),
        (ServiceLevel(slo_class=7), "slo_class is 7"),
        (ServiceLevel(slo_class="\ud800"), "slo_class"),
        (ServiceLevel(ttft_ms=-1), "ttft_ms is -1, of type int; it must be whole milliseconds, 0 to"),
        (ServiceLevel(ttft_ms=1 << 32), "ttft_ms is 4294967296"),
        (ServiceLevel(itl_ms=0.5), "itl_ms is 0.5, of type float"),
        (ServiceLevel(itl_ms=True), "itl_ms is True"),
        (ServiceLevel(priority=1.5), "priority is 1.5"),
        (ServiceLevel(priority=1 << 31), "priority is 2147483648"),
    ],
)
def test_what_is_no_service_level_is_refused_by_name(level, words):
    with pytest.raises(InvalidRequestError, match=words) as caught:
        encode_request("a", None, service_level=level, n=1, model="", request_id="", include_timings=False)
    assert caught.value.reason == "BAD_REQUEST"


def test_none_is_what_is_left_out():
    assert encoded(model=None, request_id=None) == encoded()
    with pytest.raises(InvalidRequestError, match=r"sampling is \{'temperature': 0\}, of type dict"):
        encode_request("a", {"temperature": 0}, n=1, model="", request_id="", include_timings=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "meant"), [(None, None), (3, 3.0), (np.float64(2), 2.0), (1e11, 1e9), (1e300, 1e9)])
def test_a_time_limit_may_be_any_number_of_seconds(given, meant):
    assert timeout_of(given) == meant


@pytest.mark.parametrize("given", ["5", -1, float("nan"), True, [1]])
def test_a_time_limit_that_is_none_is_refused_by_name(given):
    with pytest.raises(InvalidRequestError, match="timeout_s"):
        timeout_of(given)
