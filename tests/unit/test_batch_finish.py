"""When a sequence ends, and why."""

import pytest
from headrace_core.batch.finish import FinishRule
from headrace_core.batch.spec import ModelLimits
from headrace_core.request import DEFAULT_MAX_TOKENS, FinishReason, SamplingParams

LIMITS = ModelLimits(vocab_size=100, max_context_tokens=50, eos_token_ids=(7, 8))


def finish(token_id=1, *, num_output_tokens=5, num_tokens=10, limits=LIMITS, **params):
    rule = FinishRule(SamplingParams(**params), limits)
    return rule.reason(token_id, num_output_tokens=num_output_tokens, num_tokens=num_tokens)


def test_an_ordinary_token_ends_nothing():
    assert finish() is None


@pytest.mark.parametrize("token_id", [7, 8])
def test_every_end_of_sequence_token_ends_it_unless_ignored(token_id):
    assert finish(token_id) is FinishReason.STOP
    assert finish(token_id, ignore_eos=True) is None


def test_the_clients_stop_tokens_end_it_even_if_end_of_sequence_is_ignored():
    assert finish(3, stop_token_ids=(2, 3)) is FinishReason.STOP
    assert finish(3, stop_token_ids=(2, 3), ignore_eos=True) is FinishReason.STOP
    assert finish(4, stop_token_ids=(2, 3)) is None


def test_a_stop_token_ends_it_only_after_min_tokens_others():
    assert finish(7, min_tokens=5, num_output_tokens=5) is None
    assert finish(7, min_tokens=5, num_output_tokens=6) is FinishReason.STOP
    assert finish(7, min_tokens=0, num_output_tokens=1) is FinishReason.STOP


def test_max_tokens_are_given_out_and_not_one_more():
    assert finish(max_tokens=6, num_output_tokens=5) is None
    assert finish(max_tokens=6, num_output_tokens=6) is FinishReason.LENGTH
    assert finish(max_tokens=6, num_output_tokens=7) is FinishReason.LENGTH


def test_without_max_tokens_the_default_holds():
    large = ModelLimits(vocab_size=100, max_context_tokens=10_000, eos_token_ids=())
    assert finish(num_output_tokens=DEFAULT_MAX_TOKENS - 1, limits=large) is None
    assert finish(num_output_tokens=DEFAULT_MAX_TOKENS, limits=large) is FinishReason.LENGTH


def test_a_full_context_ends_it():
    assert finish(num_tokens=49) is None
    assert finish(num_tokens=50) is FinishReason.LENGTH
    assert finish(num_tokens=51) is FinishReason.LENGTH


def test_a_stop_token_that_is_also_the_last_possible_one_is_a_stop():
    assert finish(7, max_tokens=5) is FinishReason.STOP
    assert finish(7, num_tokens=50) is FinishReason.STOP
    assert finish(7, max_tokens=5, min_tokens=5) is FinishReason.LENGTH
