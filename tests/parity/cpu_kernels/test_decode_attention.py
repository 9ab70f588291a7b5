"""Attention of decode rows over pages: absorbed latent, its values, grouped-query."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from headrace_kernels.gqa_decode import gqa_decode, gqa_decode_ref
from headrace_kernels.mla_decode import mla_decode, mla_decode_ref, mla_decode_values, mla_decode_values_ref
from torch import Tensor

from tests.parity.cpu_kernels.inputs import NAN, assert_near, on_threads, plain, random

NO_PAGE = 2**30
PAGE_SIZES = [1, 2, 7, 16, 64]
# Heads (and key heads), widths: one head, odd ones, more than a task takes, a head whose group is larger than that.
LATENT = {"one": (1, 16, 8, 4), "odd": (7, 41, 6, 9), "thirteen": (13, 64, 16, 33)}
GROUPED = {"one": (1, 1, 16), "odd": (6, 3, 41), "shared by seven": (14, 2, 24), "each its own": (5, 5, 8)}
LENGTHS = [1, 63, 64, 65, 200, 5]


@dataclass
class Latent:
    heads: int
    latent: int
    rope: int
    value: int
    has_values: bool

    def __post_init__(self):
        self.shape = (self.latent + self.rope,)

    def weights(self, dtype):
        return plain(self.heads, self.value, self.latent, dtype=dtype, scale=self.latent**-0.5)

    def query(self, num_rows, dtype):
        return random(num_rows, self.heads, self.latent + self.rope, dtype=dtype)

    def cache(self, num_pages, page_size, dtype):
        return torch.full((num_pages, page_size, *self.shape), NAN, dtype=dtype)

    def put(self, cache, page, offset, token):
        cache[page, offset] = token

    def run(self, query, cache, table, lengths, weights):
        if self.has_values:
            return mla_decode_values(query, cache, table, lengths, weights, scale=0.3)
        return mla_decode(query, cache, table, lengths, kv_lora_rank=self.latent, scale=0.3).flatten(1)

    def specification(self, query, cache, table, lengths, weights):
        query, cache, weights = query.float(), cache.float(), weights.float()
        if self.has_values:
            return mla_decode_values_ref(query, cache, table, lengths, weights, scale=0.3)
        return mla_decode_ref(query, cache, table, lengths, kv_lora_rank=self.latent, scale=0.3).flatten(1)


@dataclass
class Grouped:
    heads: int
    groups: int
    width: int

    def __post_init__(self):
        self.shape = (2, self.groups, self.width)

    def weights(self, dtype):
        return torch.empty(0, dtype=dtype)

    def query(self, num_rows, dtype):
        return random(num_rows, self.heads, self.width, dtype=dtype)

    def cache(self, num_pages, page_size, dtype):
        return torch.full((num_pages, 2, page_size, self.groups, self.width), NAN, dtype=dtype)

    def put(self, cache, page, offset, token):
        cache[page, :, offset] = token

    def run(self, query, cache, table, lengths, weights):
        return gqa_decode(query, cache, table, lengths, scale=0.3).flatten(1)

    def specification(self, query, cache, table, lengths, weights):
        return gqa_decode_ref(query.float(), cache.float(), table, lengths, scale=0.3).flatten(1)


CASES = {
    **{f"mla_decode, {name}": Latent(*shape, has_values=False) for name, shape in LATENT.items()},
    **{f"mla_decode_values, {name}": Latent(*shape, has_values=True) for name, shape in LATENT.items()},
    **{f"gqa_decode, {name}": Grouped(*shape) for name, shape in GROUPED.items()},
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def laid_out(case, contexts: list[Tensor], page_size, dtype):
    """Put tokens into pages in no order, NaN in all that is left; entries of the table past a context are no pages."""
    counts = [-(-len(context) // page_size) for context in contexts]
    order = torch.randperm(sum(counts) + 1).tolist()
    cache = case.cache(len(order), page_size, dtype)
    # Twice as wide, of which a view is handed on.
    table = torch.full((len(contexts), 2 * max(counts, default=0) + 1), NO_PAGE, dtype=torch.int32)
    for b, context in enumerate(contexts):
        for index in range(counts[b]):
            table[b, index] = order.pop()
        for at, token in enumerate(context):
            case.put(cache, int(table[b, at // page_size]), at % page_size, token)
    lengths = torch.tensor([len(context) for context in contexts], dtype=torch.int32)
    return cache, table[:, : max(counts, default=0) + 1], lengths


def contexts_of(case, lengths, dtype):
    return [plain(length, *case.shape, dtype=dtype) for length in lengths]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_it_is_its_specification(case, page_size, dtype):
    lengths = LENGTHS if page_size in (1, 16) else [1, 65]
    where = laid_out(case, contexts_of(case, lengths, dtype), page_size, dtype)
    query, weights = case.query(len(lengths), dtype), case.weights(dtype)
    assert_near(case.run(query, *where, weights), case.specification(query, *where, weights))


def test_a_row_is_the_same_in_any_batch_in_pages_of_any_size_on_any_threads(case, dtype):
    contexts = contexts_of(case, LENGTHS, dtype)
    query, weights = case.query(len(LENGTHS), dtype), case.weights(dtype)
    whole = case.run(query, *laid_out(case, contexts, 16, dtype), weights)
    assert whole.isfinite().all()
    for page_size in PAGE_SIZES:
        where = laid_out(case, contexts, page_size, dtype)
        assert torch.equal(case.run(query, *where, weights), whole), f"pages of {page_size}"
    where = laid_out(case, contexts, 7, dtype)
    for threads in (1, 2, 3):
        assert torch.equal(on_threads(threads, lambda: case.run(query, *where, weights)), whole)
    for first, end in ((0, 1), (1, 3), (2, 6)):
        where = laid_out(case, contexts[first:end], 16, dtype)
        assert torch.equal(case.run(query[first:end], *where, weights), whole[first:end])


def test_a_context_of_nan_spoils_its_row_alone(case, dtype):
    contexts = contexts_of(case, LENGTHS, dtype)
    query, weights = case.query(len(LENGTHS), dtype), case.weights(dtype)
    whole = case.run(query, *laid_out(case, contexts, 16, dtype), weights)
    contexts[4][150] = NAN
    out = case.run(query, *laid_out(case, contexts, 16, dtype), weights)
    assert not out[4].isfinite().any()
    assert torch.equal(out[[0, 1, 2, 3, 5]], whole[[0, 1, 2, 3, 5]])


def test_no_rows_are_no_rows(case, dtype):
    query, weights = case.query(0, dtype), case.weights(dtype)
    assert case.run(query, *laid_out(case, [], 16, dtype), weights).shape[0] == 0


def test_a_table_and_lengths_may_be_views(case, dtype):
    cache, table, lengths = laid_out(case, contexts_of(case, LENGTHS, dtype), 16, dtype)
    query, weights = case.query(len(LENGTHS), dtype), case.weights(dtype)
    whole = case.run(query, cache, table, lengths, weights)
    turned, apart = table.T.contiguous().T, torch.stack((lengths, lengths * 0 + NO_PAGE), dim=1)[:, 0]
    assert torch.equal(case.run(query, cache, turned, apart, weights), whole)
