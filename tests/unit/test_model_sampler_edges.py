"""Sampling at the edges of its types: a token that is allowed, or an error of its row alone."""

from __future__ import annotations

import math

import pytest
import torch
from headrace_core.batch.step import SamplingRow
from headrace_core.errors import HeadraceError, InvalidRequestError
from headrace_core.model.sampler import sample
from headrace_core.request import FLOAT_RANGES, SampledToken, SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sampler_parts import VOCAB, row, some_logits


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"top_p": 0.9, "top_k": 5},
        {"logit_bias": {4: -3.0}},
        {"min_tokens": 1, "stop_token_ids": (4,)},
    ],
)
def test_a_row_whose_logits_are_not_finite_has_an_error_and_the_others_their_tokens(value, params):
    logits = some_logits(3)
    rows = [row(position=7), row(position=8, top_logprobs=2, **params), row(position=9, top_logprobs=2, **params)]
    expected = sample(logits, rows)
    logits[1, 4] = value
    first, error, last = sample(logits, rows)
    assert [first, last] == [expected[0], expected[2]]
    assert isinstance(error, HeadraceError)
    assert error.reason == "BAD_LOGITS"
    assert "position 8 are not all finite, so" in str(error), "the model's own are, whatever is forbidden"
    assert "checkpoint may be damaged" in str(error)


def test_all_rows_may_be_bad():
    found = sample(torch.full((3, VOCAB), math.nan), [row(), row(temperature=0.0), row(top_logprobs=1)])
    assert [error.reason for error in found if isinstance(error, HeadraceError)] == ["BAD_LOGITS"] * 3


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_whose_every_token_is_forbidden_has_an_error_not_token_0(temperature):
    everything = row(temperature=temperature, min_tokens=1, stop_token_ids=tuple(range(VOCAB)))
    error, token = sample(some_logits(2), [everything, row()])
    assert isinstance(error, InvalidRequestError)
    assert error.reason == "BAD_SAMPLING"
    assert "min_tokens" in str(error)
    assert isinstance(token, SampledToken)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_only_token_that_is_not_forbidden_is_chosen(temperature):
    logits = torch.full((1, VOCAB), 3e38)
    logits[0, 17] = -3e38
    stops = tuple(token for token in range(VOCAB) if token != 17)
    found = sample(logits, [row(temperature=temperature, min_tokens=1, stop_token_ids=stops, logit_bias={17: -100.0})])
    assert found == [SampledToken(17)]


def test_logits_that_overflow_by_penalties_are_an_error_of_their_row():
    """No valid penalty does it to logits that a sound model gives."""
    logits = some_logits(2)
    logits[0, 3] = 3e38
    error, token = sample(logits, [row((3,), repetition_penalty=0.01), row()])
    assert isinstance(error, HeadraceError)
    assert error.reason == "BAD_LOGITS"
    assert "after penalties" in str(error)
    assert isinstance(token, SampledToken)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logits_that_all_overflow_downwards_are_not_taken_for_forbidden_ones(temperature):
    """With stop tokens forbidden, others are left: the numbers are at fault, and not what the client asks for."""
    logits = torch.full((2, VOCAB), -3e38)
    params = {"repetition_penalty": 100.0, "min_tokens": 3, "stop_token_ids": (4,), "temperature": temperature}
    error, token = sample(logits, [row(tuple(range(VOCAB)), **params), row()])
    assert isinstance(error, HeadraceError)
    assert error.reason == "BAD_LOGITS"
    assert "after penalties" in str(error)
    assert isinstance(token, SampledToken)


def test_log_probabilities_are_finite_for_logits_as_far_apart_as_float32_goes():
    logits = torch.full((1, VOCAB), -3e38)
    logits[0, 1] = 3e38
    (token,) = sample(logits, [row(temperature=0.0, top_logprobs=2)])
    assert isinstance(token, SampledToken)
    assert token.logprobs is not None
    assert all(math.isfinite(value) for _, value in token.logprobs.top)


FEW = 12


EDGES = {
    name: st.sampled_from(sorted({low, high, *(v for v in inner if low <= v <= high)})) | st.floats(low, high)
    for name, (low, high) in FLOAT_RANGES.items()
    for inner in [(-0.0, 1e-45, 1.2e-38, 1e-30, 1e-7, 0.5, 0.999999, 1.0, 1.000001, 2.0)]
}


EDGE_PARAMS = st.fixed_dictionaries(
    EDGES
    | {
        "top_k": st.sampled_from([0, 1, 2, FEW - 1, FEW, FEW + 1, 2**32 - 1]),
        "seed": st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1]),
        "min_tokens": st.sampled_from([0, 1, 3, 256]),
        "stop_token_ids": st.sets(st.integers(0, FEW - 1)).map(tuple),
        "logit_bias": st.dictionaries(
            st.integers(0, FEW - 1), st.sampled_from([-100.0, -0.0, 1e-45, 100.0]), max_size=FEW
        )
        | st.just(dict.fromkeys(range(FEW), -100.0)),
        "top_logprobs": st.sampled_from([None, 0, 20]),
    }
)


LOGIT = st.floats(-3e4, 3e4, width=32) | st.sampled_from([0.0, -0.0, 1e-45, 6e4, -6e4, 3e36, -3.4e38, 3.4e38])


@settings(max_examples=300, deadline=None)
@given(
    EDGE_PARAMS,
    st.lists(LOGIT, min_size=FEW, max_size=FEW),
    st.lists(st.integers(0, FEW - 1), max_size=5),
    st.sampled_from([0, 2**32 - 1]),
)
def test_a_token_is_never_outside_the_vocabulary_nor_forbidden_for_any_valid_parameters(params, values, output, place):
    filled = SamplingParams(**params)
    filled.validate()
    one = SamplingRow(filled, [0, 1, 1, FEW - 1], output, place, place, (1,))
    bystander = row(position=3, top_p=0.9)
    logits = torch.stack((torch.tensor(values), some_logits()[0, :FEW]))
    found, other = sample(logits, [one, bystander])
    assert [other] == sample(logits[1:], [bystander])
    forbidden = {1, *params["stop_token_ids"]} if len(output) < params["min_tokens"] else set()
    if isinstance(found, HeadraceError):
        is_huge = max(abs(value) for value in values) > 1e36
        assert found.reason == "BAD_SAMPLING" if len(forbidden) == FEW else is_huge
        return
    assert found.token_id in set(range(FEW)) - forbidden
    if filled.is_greedy and not filled.logit_bias and filled.repetition_penalty == 1.0 and not output:
        allowed = [values[t] if t not in forbidden else -math.inf for t in range(FEW)]
        assert values[found.token_id] == max(allowed)
