"""What a worker refuses at its door, field by field, and what it lets in."""

from dataclasses import replace

import pytest
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.errors import InvalidRequestError
from headrace_core.request import DEFAULT_MAX_TOKENS, SamplingParams

LIMITS = ModelLimits(vocab_size=100, max_context_tokens=8, eos_token_ids=(0,))
GOOD = SequenceSpec(
    request_id="r-1",
    attempt=1,
    sample_index=0,
    token_ids=[1, 2, 3, 4],
    num_prompt_tokens=4,
    params=SamplingParams(seed=1),
)


def refusal(spec: SequenceSpec, limits: ModelLimits = LIMITS) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as raised:
        spec.check(limits)
    return raised.value


def with_output(num_output_tokens: int, **params) -> SequenceSpec:
    token_ids = [1] * (2 + num_output_tokens)
    return replace(GOOD, token_ids=token_ids, num_prompt_tokens=2, params=SamplingParams(seed=1, **params))


@pytest.mark.parametrize(
    "spec",
    [
        GOOD,
        replace(GOOD, attempt=7),
        replace(GOOD, token_ids=[1], num_prompt_tokens=1),
        replace(GOOD, num_prompt_tokens=1),
        replace(GOOD, token_ids=[99] * 7, num_prompt_tokens=7),
        replace(GOOD, token_ids=[0, 99], num_prompt_tokens=2),
        with_output(4, max_tokens=5),
        with_output(0, stop_token_ids=(99,), logit_bias={99: 1.0}),
        with_output(0, min_tokens=1, stop_token_ids=tuple(range(1, 99))),
    ],
    ids=lambda spec: f"{len(spec.token_ids)}-of-{spec.num_prompt_tokens}",
)
def test_what_is_right_passes(spec):
    spec.check(LIMITS)


@pytest.mark.parametrize(
    ("spec", "reason", "words"),
    [
        (replace(GOOD, request_id=""), "BAD_REQUEST", "request_id"),
        (replace(GOOD, attempt=0), "BAD_REQUEST", "attempts count from 1"),
        (replace(GOOD, token_ids=[], num_prompt_tokens=0), "EMPTY_PROMPT", "token_ids is empty"),
        (replace(GOOD, num_prompt_tokens=0), "BAD_REQUEST", "num_prompt_tokens is 0, of 4 token_ids"),
        (replace(GOOD, num_prompt_tokens=5), "BAD_REQUEST", "num_prompt_tokens is 5, of 4 token_ids"),
        (
            replace(GOOD, token_ids=[1] * 8, num_prompt_tokens=8),
            "PROMPT_TOO_LONG",
            "8 tokens leave no room to generate in a context of 8",
        ),
        (replace(GOOD, token_ids=[1] * 9, num_prompt_tokens=9), "PROMPT_TOO_LONG", "9 tokens leave no room"),
        (replace(GOOD, params=SamplingParams()), "BAD_SAMPLING", "seed is unset"),
        (with_output(5, max_tokens=5), "BAD_REQUEST", "all of max_tokens=5 tokens are produced already"),
        (with_output(5, max_tokens=4), "BAD_REQUEST", "all of max_tokens=4"),
        (replace(GOOD, token_ids=[1, 2, 3, 100]), "BAD_TOKEN", "token_ids: 100 is outside the vocabulary of 100"),
        (replace(GOOD, token_ids=[-1, 2, 3, 4]), "BAD_TOKEN", "token_ids: -1 is outside"),
        (with_output(0, stop_token_ids=(100,)), "BAD_TOKEN", "stop_token_ids: 100"),
        (with_output(0, logit_bias={100: 1.0}), "BAD_TOKEN", "logit_bias: 100"),
        (
            with_output(0, min_tokens=1, stop_token_ids=tuple(range(1, 100))),
            "BAD_SAMPLING",
            "the whole vocabulary of 100",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_refused_by_name(spec, reason, words):
    error = refusal(spec)
    assert error.reason == reason
    assert words in str(error)


def test_tokens_of_earlier_attempts_count_as_output():
    assert GOOD.num_output_tokens == 0
    assert with_output(3).num_output_tokens == 3


def test_without_max_tokens_the_default_bounds_what_earlier_attempts_produced():
    limits = replace(LIMITS, max_context_tokens=10_000)
    with_output(DEFAULT_MAX_TOKENS - 1).check(limits)
    assert refusal(with_output(DEFAULT_MAX_TOKENS), limits).reason == "BAD_REQUEST"
