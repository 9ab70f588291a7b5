"""Attention kernels against their specifications, with NaN in every slot that must not be read."""

from __future__ import annotations

import pytest
import torch
from headrace_core.model.gqa import key_value_rows
from headrace_kernels.backend import use_backend
from headrace_kernels.causal_attention import causal_attention, causal_attention_ref
from headrace_kernels.gpu.launch import recording
from headrace_kernels.gqa_decode import gqa_decode, gqa_decode_ref
from headrace_kernels.gqa_prefill import gqa_prefill, gqa_prefill_ref
from headrace_kernels.latent_store import latent_store, latent_store_ref
from headrace_kernels.mla_decode import mla_decode, mla_decode_ref, plan_mla_decode
from headrace_kernels.mla_prefill import mla_prefill, mla_prefill_ref
from headrace_kernels.paged_slots import paged_slots

LENGTHS = [[1], [5], [8, 1, 13], [4, 4], [3, 9, 2, 16]]
PAGE_SIZE = 4
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def scattered(lengths, row_shape, dtype, *, is_paired=False):
    """A cache of NaN but for the sequences' tokens, on pages in no order; with its table and context lengths."""
    generator = torch.Generator().manual_seed(0)
    pages = [-(-length // PAGE_SIZE) for length in lengths]
    order = torch.randperm(sum(pages) + 3, generator=generator).tolist()
    page_shape = (2, PAGE_SIZE, *row_shape) if is_paired else (PAGE_SIZE, *row_shape)
    cache = torch.full((len(order), *page_shape), float("nan"), dtype=dtype)
    table = torch.full((len(lengths), max(pages)), -7, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for index in range(pages[b]):
            page = order.pop()
            table[b, index] = page
            used = min(PAGE_SIZE, length - index * PAGE_SIZE)
            place = (page, slice(None), slice(used)) if is_paired else (page, slice(used))
            cache[place] = torch.randn(cache[place].shape, generator=generator).to(dtype)
    # An entry past the pages may be anything that is a page.
    table[table < 0] = order[0]
    return cache, table, torch.tensor(lengths, dtype=torch.int32)


def starts(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_mla_decode_equals_its_specification(lengths, dtype):
    cache, table, lens = scattered(lengths, (12,), dtype)
    query = torch.randn(len(lengths), 3, 12, dtype=dtype)
    arguments = (query, cache, table, lens)
    expected = mla_decode_ref(*arguments, kv_lora_rank=8, scale=0.3)
    found = mla_decode(*arguments, kv_lora_rank=8, scale=0.3)
    planned = paged_slots(table, lens, PAGE_SIZE)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCES[dtype])
    assert torch.equal(mla_decode(*arguments, kv_lora_rank=8, scale=0.3, slots=planned), found), (
        "a planned gather is the same gather"
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gqa_decode_equals_its_specification(lengths, groups, dtype):
    cache, table, lens = scattered(lengths, (groups, 6), dtype, is_paired=True)
    query = torch.randn(len(lengths), 4, 6, dtype=dtype)
    found = gqa_decode(query, cache, table, lens, scale=0.3)
    expected = gqa_decode_ref(query, cache, table, lens, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("queries", "keys"), [([1], [1]), ([1], [9]), ([7], [7]), ([3], [8]), ([2, 5, 1], [2, 9, 4]), ([300], [303])]
)
@pytest.mark.parametrize("value_dim", [8, 5])
def test_causal_attention_equals_its_specification(queries, keys, value_dim, dtype):
    query = torch.randn(sum(queries), 4, 8, dtype=dtype)
    key = torch.randn(sum(keys), 2, 8, dtype=dtype)
    value = torch.randn(sum(keys), 2, value_dim, dtype=dtype)
    arguments = (query, key, value, starts(queries), starts(keys))
    found = causal_attention(*arguments, scale=0.3)
    expected = causal_attention_ref(*arguments, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCES[dtype])


NUM_KEYS = [1, 2, 7, 8, 9, 15, 16, 17, 40]


def heads_with(spoilt, value, num_queries, num_keys, dtype):
    """Two heads alike in shape; the first one's `spoilt` holds `value`."""
    query, key, tokens = (torch.randn(n, 2, 8).to(dtype) for n in (num_queries, num_keys, num_keys))
    if spoilt == "query":
        query[-1, 0] = value
    elif spoilt == "keys":
        key[:, 0] = value
    else:
        query[:, 0], key[:, 0] = value, -value
    return query, key, tokens, starts([num_queries]), starts([num_keys])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("spoilt", "value"),
    [("query", float("nan")), ("query", float("inf")), ("keys", float("nan")), ("keys", float("-inf")), ("both", 3e4)],
)
def test_a_query_whose_scores_are_not_finite_is_nan_whatever_the_number_of_keys(spoilt, value, dtype):
    """Where softmax is NaN torch's fused attention gives 0: for few keys, and where every score is -inf."""
    # Finite numbers whose scores are not: every one is -inf.
    scale = 1e30 if spoilt == "both" else 0.3
    for num_keys in NUM_KEYS:
        for num_queries in sorted({1, -(-num_keys // 2), num_keys}):
            arguments = heads_with(spoilt, value, num_queries, num_keys, dtype)
            found = causal_attention(*arguments, scale=scale)
            assert not found[-1, 0].isfinite().any(), f"{num_queries} queries, {num_keys} keys"


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rows_that_only_look_as_if_torch_had_given_them_up_stay_as_they_are(dtype):
    """A log-sum-exp of 0, by which such rows are found, may be a row's own: one key, a score of 0."""
    query, key, value = torch.zeros(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    arguments = (query.to(dtype), key.to(dtype), value.to(dtype), starts([1, 1, 1]), starts([1, 1, 1]))
    found = causal_attention(*arguments, scale=0.3)
    torch.testing.assert_close(found, arguments[2].expand(3, 2, 8), rtol=0, atol=0)


@pytest.mark.parametrize("queries", [[4, 1, 6], [4, 9, 11]])
def test_mla_prefill_equals_its_specification_and_absorption(queries):
    keys = [4, 9, 11]
    cache, table, lens = scattered(keys, (12,), torch.float32)
    slots = paged_slots(table, lens, PAGE_SIZE)
    rows = torch.cat([cache.view(-1, 12)[s[:k]] for s, k in zip(slots, keys, strict=True)])
    w_uk, w_uv, query = torch.randn(3, 7, 8), torch.randn(3, 5, 8), torch.randn(sum(queries), 3, 7 + 4)
    arguments = (query, rows, w_uk, w_uv, starts(queries), starts(keys))
    found = mla_prefill(*arguments, scale=0.3)
    torch.testing.assert_close(found, mla_prefill_ref(*arguments, scale=0.3), rtol=0, atol=1e-5)

    last = starts(queries)[1:].long() - 1
    absorbed = torch.einsum("bhn,hnd->bhd", query[last, :, :7], w_uk)
    absorbed = torch.cat((absorbed, query[last, :, 7:]), dim=-1)
    latents = mla_decode(absorbed, cache, table, lens, kv_lora_rank=8, scale=0.3)
    values = torch.einsum("bhd,hvd->bhv", latents, w_uv)
    torch.testing.assert_close(found[last], values, rtol=0, atol=1e-5)


def test_gqa_prefill_equals_its_specification():
    queries, keys = [4, 1, 6], [4, 9, 11]
    cache, table, lens = scattered(keys, (2, 6), torch.float32, is_paired=True)
    planned = paged_slots(table, lens, PAGE_SIZE)
    slots = torch.cat([row[:length] for row, length in zip(planned, keys, strict=True)])
    query = torch.randn(sum(queries), 4, 6)
    arguments = (query, cache, slots, starts(queries), starts(keys))
    found = gqa_prefill(*arguments, scale=0.3)
    torch.testing.assert_close(found, gqa_prefill_ref(*arguments, scale=0.3), rtol=0, atol=1e-5)


def test_paged_slots_repeats_the_last_slot_past_the_end():
    table = torch.tensor([[5, 2], [9, 0]], dtype=torch.int32)
    slots = paged_slots(table, torch.tensor([6, 3], dtype=torch.int32), 4)
    assert slots.shape == (2, 32)
    assert slots[0].tolist() == [20, 21, 22, 23, 8, 9] + [9] * 26
    assert slots[1].tolist() == [36, 37, 38] + [38] * 29


def test_padding_stores_neither_keys_nor_values():
    slots, page_size = torch.tensor([5, -1, 2]), 4
    rows, cache = torch.ones(3, 6), torch.zeros(2 * 2 * page_size, 6)
    for slot_rows in key_value_rows(slots, page_size):
        latent_store(rows, cache, slot_rows)
    assert cache.any(dim=1).nonzero()[:, 0].tolist() == [2, 6, 9, 13], "page 0: keys 0-3, values 4-7; page 1: 8-15"


def test_latent_store_skips_slot_minus_one_and_touches_nothing_else():
    latents = torch.randn(4, 3)
    cache = torch.full((6, 3), float("nan"))
    latent_store(latents, cache, torch.tensor([4, -1, 0, 2]))
    expected = torch.full((6, 3), float("nan"))
    latent_store_ref(latents, expected, torch.tensor([4, -1, 0, 2]))
    torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)
    assert cache.isnan().all(dim=1).tolist() == [False, True, False, True, False, True]
    latent_store(latents[:0], cache, torch.tensor([], dtype=torch.int64))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="latents"):
        latent_store(torch.zeros(2, 3), torch.zeros(4, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="cache is"):
        latent_store(torch.zeros(2, 3), torch.zeros(4, 3).double(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="contiguous"):
        latent_store(torch.zeros(3, 2).T, torch.zeros(4, 3), torch.tensor([0, 1]))
    lens = torch.ones(1, dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="query"):
        mla_decode(torch.zeros(1, 2, 5), torch.zeros(1, 4, 6), table, lens, kv_lora_rank=3, scale=1)
    with pytest.raises(ValueError, match="query"):
        gqa_decode(torch.zeros(1, 3, 6), torch.zeros(1, 2, 4, 2, 6), table, lens, scale=1)
    with pytest.raises(ValueError, match="block_table"):
        paged_slots(table[0], lens, 4)
    with pytest.raises(ValueError, match="w_uk"):
        mla_prefill(
            torch.zeros(1, 2, 5), torch.zeros(1, 6), torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), lens, lens, scale=1
        )
    with pytest.raises(ValueError, match="key"):
        causal_attention(torch.zeros(1, 2, 5), torch.zeros(1, 2, 6), torch.zeros(1, 2, 6), lens, lens, scale=1)


@pytest.mark.parametrize(("num_heads", "num_programs"), [(16, 2 * 132), (64, 132), (128, 132 // 2)])
def test_each_multiprocessor_has_two_programs_of_sixteen_heads_or_one_of_more(num_heads, num_programs):
    context_lens = torch.empty(8, dtype=torch.int32, device="meta")
    with use_backend("triton"), recording("cuda"):
        assert plan_mla_decode(context_lens, 64, num_heads).num_programs == num_programs
