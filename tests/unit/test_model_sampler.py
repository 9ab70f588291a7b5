"""Sampling: each parameter's meaning, draws that depend on nothing but their own row, and statistics."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from headrace_core.batch.step import SamplingMemo, SamplingRow
from headrace_core.model import sampler
from headrace_core.model.sampler import sample
from headrace_core.request import SampledToken, SamplingParams
from headrace_kernels.counter_random import philox, uniform
from headrace_kernels.draws import Draws
from headrace_kernels.reference.sampling import filter_logits
from headrace_kernels.sampling import filter_logits_ref, pick, sample_tokens
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.sampler_parts import VOCAB, drawn, row, some_logits

VOCAB_OF_V3 = 129_280


def test_philox_gives_the_published_words():
    """Known answers of Random123's kat_vectors."""
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    )


def test_numbers_are_uniform_and_differ_in_every_argument():
    numbers = [uniform(seed, 0, position) for seed in range(40) for position in range(50)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == len(numbers)
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.02)
    base = uniform(1, 2, 3)
    assert base == uniform(1, 2, 3)
    assert base not in (uniform(1 + (1 << 40), 2, 3), uniform(1, 3, 3), uniform(1, 2, 4))


def test_greedy_takes_the_best_and_the_first_of_equals():
    logits = some_logits(3)
    logits[2, [5, 9]] = 100.0
    tokens = sample(logits, [row(temperature=0.0), row(top_k=1), row(temperature=0.0)])
    assert [t.token_id for t in tokens[:2]] == logits[:2].argmax(dim=1).tolist()
    assert tokens[2].token_id == 5


def test_draws_follow_the_probabilities():
    logits = some_logits()
    counts = torch.bincount(torch.tensor(drawn(logits, 20000, temperature=0.8)), minlength=VOCAB)
    expected = (logits[0] / 0.8).softmax(dim=0) * 20000
    kept = expected > 5
    chi_squared = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    degrees = int(kept.sum()) - 1
    assert chi_squared < degrees + 4 * math.sqrt(2 * degrees)


def test_the_smallest_temperature_is_greedy():
    logits = some_logits()
    assert set(drawn(logits, 50, temperature=1e-300)) == {int(logits.argmax())}


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_k": 3, "top_p": 0.85}, {0, 1}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_p": 0.95, "min_p": 0.2}, {0, 1, 2}),
        ({"top_k": 400}, {0, 1, 2, 3, 4}),
    ],
)
def test_filters_keep_just_what_they_should(params, allowed):
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]]).log()
    assert set(drawn(logits, 600, **params)) == allowed


@given(
    st.lists(st.floats(-20, 20), min_size=1, max_size=30),
    st.integers(0, 40),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
def test_filter_equals_its_specification(values, top_k, top_p, min_p):
    logits = torch.tensor([values, values], dtype=torch.float64)
    # Beside a row that filters nothing.
    arguments = (
        torch.tensor([top_k, 0]),
        torch.tensor([top_p, 1.0], dtype=torch.float64),
        torch.tensor([min_p, 0.0], dtype=torch.float64),
    )
    found = filter_logits(logits, *arguments)
    expected = filter_logits_ref(logits, *arguments)
    # A mass that meets top_p to the last bit may fall either way.
    mass = logits[0].softmax(0).sort(descending=True).values.cumsum(0)
    if not ((mass - top_p).abs() < 1e-12).any():
        assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], logits[1])
    assert found[0].isfinite().any(), "something is always left"


@given(st.lists(st.floats(-700, 10), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True))
def test_a_pick_is_where_the_distribution_passes_the_number(values, number):
    logits = torch.tensor([[-math.inf, *values, -math.inf]], dtype=torch.float64)
    token = int(pick(logits, torch.tensor([number], dtype=torch.float64)))
    cumulative = logits[0].softmax(dim=0).cumsum(dim=0)
    assert logits[0, token] > -math.inf
    assert cumulative[token] >= number * (1 - 1e-9)
    assert token == 0 or cumulative[token - 1] <= number + 1e-9


def test_a_number_just_below_one_picks_the_last_token_that_may_be_drawn():
    logits = torch.tensor([[0.0, 0.0, 0.0, -math.inf]], dtype=torch.float64)
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert int(pick(logits, almost_one)) == 2


@given(st.permutations(range(6)))
def test_a_row_draws_the_same_whatever_shares_its_batch(order):
    logits = some_logits(6)
    rows = [
        row(temperature=0.0),
        row(position=1),
        row(position=1, sample_index=3, top_p=0.7),
        row(seed=12, top_k=5, temperature=2.0, top_logprobs=3),
        row((3, 4), (5,), repetition_penalty=1.5, presence_penalty=0.5, min_p=0.1),
        row(logit_bias={7: 3.0}, min_tokens=3),
    ]
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(6)]
    together = sample(logits[list(order)], [rows[i] for i in order])
    assert [t.token_id for t in together] == [alone[i].token_id for i in order]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, [2, 3, 4]] = torch.tensor([4.0, 3.0, -1.0])
    greedy = {"temperature": 0.0, "repetition_penalty": 2.0}
    assert sample(logits, [row((2,), (), **greedy)])[0].token_id == 3
    assert sample(logits, [row((2, 2), (3,), **greedy)])[0].token_id == 2
    logits[0, [2, 3]] = torch.tensor([-1.5, -9.0])
    assert sample(logits, [row((4,), (), **greedy)])[0].token_id == 2, "-1 * 2 < -1.5"


def test_presence_counts_once_and_frequency_each_time_and_prompts_not_at_all():
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 3]] = torch.tensor([4.0, 3.0])
    once = {"temperature": 0.0, "presence_penalty": 0.9}
    each = {"temperature": 0.0, "frequency_penalty": 0.6}
    assert sample(logits, [row((), (2, 2, 2), **once)])[0].token_id == 2
    assert sample(logits, [row((), (2,), **each)])[0].token_id == 2
    assert sample(logits, [row((), (2, 2), **each)])[0].token_id == 3
    assert sample(logits, [row((2, 2), (), **each)])[0].token_id == 2


def test_logit_bias_is_added():
    logits = some_logits()
    assert sample(logits, [row(temperature=0.0, logit_bias={6: 100.0})])[0].token_id == 6
    assert 6 not in drawn(logits, 500, logit_bias={6: -100.0})


def test_end_and_stop_tokens_wait_for_min_tokens():
    logits = torch.zeros(1, VOCAB)
    logits[0, [1, 2, 3]] = torch.tensor([9.0, 8.0, 7.0])
    params = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (2,)}
    assert sample(logits, [row((), (5,), **params)])[0].token_id == 3
    assert sample(logits, [row((), (5, 6), **params)])[0].token_id == 1


def test_logprobs_are_those_of_the_models_own_logits():
    logits = some_logits(2)
    before = logits.clone()
    biased = row(temperature=0.0, logit_bias={6: 100.0}, top_logprobs=3)
    tokens = sample(logits, [biased, row(temperature=0.0)])
    assert torch.equal(logits, before), "the input is not changed"
    expected = logits[0].log_softmax(dim=0)
    assert tokens[0].logprobs is not None
    assert tokens[0].logprobs.logprob == pytest.approx(expected[6].item())
    best = expected.topk(3)
    assert [t for t, _ in tokens[0].logprobs.top] == best.indices.tolist()
    assert [v for _, v in tokens[0].logprobs.top] == pytest.approx(best.values.tolist())
    assert tokens[1].logprobs is None


def test_no_top_logprobs_still_gives_the_chosen_tokens():
    token = sample(some_logits(), [row(top_logprobs=0)])[0]
    assert token.logprobs is not None
    assert token.logprobs.top == ()
    assert token.logprobs.logprob < 0


def coarse_logits(rows):
    """Logits as bfloat16 leaves them: many are equal."""
    return torch.randn(rows, 1536, generator=torch.Generator().manual_seed(3)).mul(2).bfloat16().float()


def test_the_most_probable_tokens_do_not_depend_on_what_the_neighbours_ask_for():
    logits = coarse_logits(200)
    asks = [row(temperature=0.0, top_logprobs=(2, 5, 20)[i % 3]) for i in range(200)]
    alone = [sample(logits[i : i + 1], asks[i : i + 1])[0] for i in range(200)]
    assert sample(logits, asks) == alone


def test_of_equally_probable_tokens_the_lowest_id_comes_first_as_greedy_takes_it():
    logits = coarse_logits(200)
    logits[0] = 0.0
    logits[0, ::2] = -0.0
    logits[1] = -logits[1].abs()
    for values, token in zip(logits, sample(logits, [row(temperature=0.0, top_logprobs=20)] * 200), strict=True):
        assert isinstance(token, SampledToken)
        assert token.logprobs is not None
        found = [token_id for token_id, _ in token.logprobs.top]
        assert found == (-values).sort(stable=True).indices[:20].tolist()
        assert found[0] == token.token_id
        assert token.logprobs.top[0][1] == token.logprobs.logprob


def test_tokens_are_ranked_by_logits_where_log_probabilities_are_equal():
    logits = torch.zeros(1, VOCAB)
    logits[0, 1:] = torch.linspace(-3e-7, -1e-9, VOCAB - 1)
    (token,) = sample(logits, [row(temperature=0.0, top_logprobs=20)])
    assert isinstance(token, SampledToken)
    assert token.logprobs is not None
    assert [token_id for token_id, _ in token.logprobs.top] == [0, *range(VOCAB - 1, VOCAB - 20, -1)]


"""A vocabulary small enough for every subset of it to come up."""


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.lists(st.integers(0, 9), max_size=60),
    st.integers(0, 12),
    st.sampled_from([1.0, 1.3]),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from([0.0, -0.4]),
)
def test_a_memo_changes_no_token_however_the_output_came_about(prompt, output, known, repetition, presence, frequency):
    """Kept from the first tokens on, taken up in the middle as after a hand-off, or none: the same, step by step."""
    params = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    params |= {"min_tokens": 7, "logit_bias": {2: 0.5}, "temperature": 0.0}
    memo, grown = SamplingMemo(), output[: min(known, len(output))]
    for length in range(len(grown), len(output) + 1):
        grown += output[len(grown) : length]
        logits = some_logits(seed=length)
        kept = replace(row(prompt, (), **params), output_token_ids=grown, memo=memo)
        assert sample(logits, [kept]) == sample(logits, [kept]) == sample(logits, [row(prompt, grown, **params)])


def test_a_token_costs_no_look_at_all_that_came_before():
    """Lists are read whole once; then each token adds itself."""

    class Counted(list[int]):
        num_read = 0

        def __iter__(self):
            Counted.num_read += len(self)
            return super().__iter__()

        def __getitem__(self, index):
            Counted.num_read += 1
            return super().__getitem__(index)

    params = SamplingParams(seed=1, repetition_penalty=1.1, frequency_penalty=0.1, min_tokens=9, stop_token_ids=(5,))
    prompt, output, memo = Counted([3, 4] * 5000), Counted([7] * 5000), SamplingMemo()
    logits = some_logits()
    for _ in range(20):
        (token,) = sample(logits, [SamplingRow(params, prompt, output, 0, len(output), (1,), memo)])
        assert isinstance(token, SampledToken)
        output.append(token.token_id)
    assert Counted.num_read <= 2 * 15_000


def test_a_long_prompts_penalties_are_prepared_without_python_objects_of_its_tokens():
    """160,000 of them took 200 ms of the thread that steps everybody."""
    random = np.random.default_rng(1)
    prompt = random.integers(0, VOCAB_OF_V3, 160_000).tolist()
    one = row(prompt, prompt[:1000], repetition_penalty=1.3, presence_penalty=0.3, temperature=0.0)
    logits = torch.randn(1, VOCAB_OF_V3, generator=torch.Generator().manual_seed(2))
    tracemalloc.start()
    try:
        sample(logits, [one])
        assert tracemalloc.get_traced_memory()[1] < 4 * 8 * VOCAB_OF_V3
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 64])
def test_what_draws_depend_on_lies_where_kernels_were_compiled_for(num_rows, monkeypatch):
    """Triton compiles for pointers that are multiples of 16 bytes; another would be compiled while clients wait."""
    kept = []
    monkeypatch.setattr(
        sampler, "sample_tokens", lambda logits, draws: kept.append(draws) or sample_tokens(logits, draws)
    )
    rows = [
        row(position=i, top_k=i + 2, top_p=1 / (i + 1), seed=2**64 - 1 - i, sample_index=i) for i in range(num_rows)
    ]
    sample(some_logits(num_rows), rows)
    columns = [getattr(kept[0], field.name) for field in fields(Draws)]
    assert not any(column.data_ptr() % 16 for column in columns)
    assert all(column.is_contiguous() for column in columns)
    numbers = list(range(num_rows))
    assert kept[0].positions.tolist() == kept[0].sample_indices.tolist() == numbers
    assert kept[0].top_k.tolist() == [i + 2 for i in numbers]
    assert kept[0].top_p.tolist() == [1 / (i + 1) for i in numbers]
    assert kept[0].seeds.tolist() == [-1 - i for i in numbers]
    assert (set(kept[0].temperatures.tolist()), set(kept[0].min_p.tolist())) == ({1.0}, {0.0})


def test_an_empty_step_samples_nothing():
    assert sample(torch.zeros(0, VOCAB), []) == []
    with pytest.raises(ValueError, match="rows"):
        sample(torch.zeros(2, VOCAB), [row()])
