"""Causal attention of prompt chunks: latent, expanded; grouped-query over pages."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from headrace_kernels.gqa_prefill import gqa_prefill, gqa_prefill_ref
from headrace_kernels.mla_prefill import mla_prefill, mla_prefill_ref
from torch import Tensor

from tests.parity.cpu_kernels.inputs import NAN, assert_near, on_threads, plain, random, starts


@dataclass
class Latent:
    heads: int
    latent: int
    rope: int
    nope: int
    value: int

    def query(self, count, dtype):
        return random(count, self.heads, self.nope + self.rope, dtype=dtype)

    def keys(self, count, dtype):
        return random(count, self.latent + self.rope, dtype=dtype)

    def weights(self, dtype):
        widths = self.nope, self.value
        return [plain(self.heads, width, self.latent, dtype=dtype, scale=self.latent**-0.5) for width in widths]

    def run(self, query, keys, weights, query_starts, key_starts, page_size=16, function=mla_prefill):
        return function(query, keys, *weights, query_starts, key_starts, scale=0.3)

    def specification(self, query, keys, weights, *where):
        wide = [weight.float() for weight in weights]
        return self.run(query.float(), keys.float(), wide, *where, function=mla_prefill_ref)


@dataclass
class Grouped:
    heads: int
    groups: int
    width: int

    def query(self, count, dtype):
        return random(count, self.heads, self.width, dtype=dtype)

    def keys(self, count, dtype):
        return plain(count, 2, self.groups, self.width, dtype=dtype)

    def weights(self, dtype):
        return []

    def run(self, query, keys, weights, query_starts, key_starts, page_size=16, function=gqa_prefill):
        count = len(keys)
        num_pages = count // page_size + 2
        cache = torch.full((num_pages, 2, page_size, *keys.shape[2:]), NAN, dtype=keys.dtype)
        slots = torch.randperm(num_pages * page_size)[:count]
        cache[slots // page_size, :, slots % page_size] = keys
        return function(query, cache, slots, query_starts, key_starts, scale=0.3)

    def specification(self, query, keys, weights, *where):
        return self.run(query.float(), keys.float(), weights, *where, function=gqa_prefill_ref)


CASES = {
    "mla_prefill, one": Latent(1, 16, 8, 8, 4),
    "mla_prefill, odd": Latent(3, 41, 6, 9, 17),
    "mla_prefill, wide": Latent(2, 64, 16, 32, 33),
    "gqa_prefill, one": Grouped(1, 1, 16),
    "gqa_prefill, odd": Grouped(6, 3, 41),
    "gqa_prefill, shared by seven": Grouped(7, 1, 24),
}
# New tokens and all tokens of each sequence.
BATCHES = {
    "one token": [(1, 1)],
    "behind a prefix": [(1, 130), (70, 140)],
    "many": [(5, 5), (0, 9), (64, 64), (65, 65), (3, 67), (1, 1)],
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def of(batch) -> tuple[Tensor, Tensor]:
    return starts([new for new, _ in batch]), starts([length for _, length in batch])


def inputs(case, batch, dtype):
    num_queries, num_keys = (int(each[-1]) for each in of(batch))
    return case.query(num_queries, dtype), case.keys(num_keys, dtype), case.weights(dtype)


@pytest.mark.parametrize("name", BATCHES)
def test_it_is_its_specification(case, name, dtype):
    query, keys, weights = inputs(case, BATCHES[name], dtype)
    got = case.run(query, keys, weights, *of(BATCHES[name]))
    assert_near(got, case.specification(query, keys, weights, *of(BATCHES[name])))


def test_nothing_new_is_nothing(case, dtype):
    query = torch.empty(0, case.heads, case.query(1, dtype).shape[2], dtype=dtype)
    for batch in ([], [(0, 7)]):
        assert case.run(query, case.keys(of(batch)[1][-1], dtype), case.weights(dtype), *of(batch)).shape[0] == 0


@pytest.mark.parametrize("chunk", [1, 5, 50, 64, 100])
def test_a_token_is_the_same_however_its_prompt_is_cut(case, chunk, dtype):
    query, keys, weights = inputs(case, [(130, 130)], dtype)
    whole = case.run(query, keys, weights, *of([(130, 130)]))
    firsts = range(0, 130, chunk) if chunk > 1 else (0, 63, 64, 129)
    for first in firsts:
        end = min(first + chunk, 130)
        part = case.run(query[first:end], keys[:end], weights, *of([(end - first, end)]))
        assert torch.equal(part, whole[first:end])


def test_a_sequence_is_the_same_in_any_batch_in_pages_of_any_size_on_any_threads(case, dtype):
    batch = BATCHES["many"]
    query, keys, weights = inputs(case, batch, dtype)
    whole = case.run(query, keys, weights, *of(batch))
    for page_size in (1, 7, 64):
        assert torch.equal(case.run(query, keys, weights, *of(batch), page_size), whole)
    for threads in (1, 2, 3):
        assert torch.equal(on_threads(threads, lambda: case.run(query, keys, weights, *of(batch))), whole)
    query_starts, key_starts = of(batch)
    for b, each in enumerate(batch):
        queries, context = slice(*query_starts[b : b + 2]), slice(*key_starts[b : b + 2])
        assert torch.equal(case.run(query[queries], keys[context], weights, *of([each])), whole[queries])


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_is_not_finite_shows_in_later_tokens_of_its_sequence_alone(case, value, dtype):
    batch = [(5, 5), (70, 140), (3, 3)]
    query, keys, weights = inputs(case, batch, dtype)
    whole = case.run(query, keys, weights, *of(batch))
    # Token 100 of the second sequence: query 30 of its 70.
    keys[5 + 100] = value
    out = case.run(query, keys, weights, *of(batch))
    assert torch.equal(out[: 5 + 30], whole[: 5 + 30])
    assert torch.equal(out[5 + 70 :], whole[5 + 70 :])
    assert not out[5 + 30 : 5 + 70].isfinite().any()


def test_a_query_of_nan_is_its_own_alone(case, dtype):
    query, keys, weights = inputs(case, [(20, 90)], dtype)
    whole = case.run(query, keys, weights, *of([(20, 90)]))
    query[7] = NAN
    out = case.run(query, keys, weights, *of([(20, 90)]))
    assert not out[7].isfinite().any()
    assert torch.equal(torch.cat((out[:7], out[8:])), torch.cat((whole[:7], whole[8:])))


@pytest.mark.parametrize("rows", [2100])
def test_more_queries_than_are_computed_at_once(rows, dtype):
    for case in (Latent(1, 4, 2, 2, 2), Grouped(1, 1, 4)):
        query, keys, weights = inputs(case, [(rows, rows)], dtype)
        whole = case.run(query, keys, weights, *of([(rows, rows)]))
        last = case.run(query[-9:], keys, weights, *of([(9, rows)]))
        assert torch.equal(whole[-9:], last)
        assert_near(last, case.specification(query[-9:], keys, weights, *of([(9, rows)])))


def test_starts_of_another_dtype_are_refused(case, dtype):
    query, keys, weights = inputs(case, [(5, 5)], dtype)
    with pytest.raises(ValueError, match="int32"):
        case.run(query, keys, weights, *(each.long() for each in of([(5, 5)])))
