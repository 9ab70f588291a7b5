"""Absorbed latent attention, planned and with a fixed number of splits, against its specification."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.latent_fp8 import pack_latents
from headrace_kernels.mla_decode import (
    mla_decode,
    mla_decode_ref,
    mla_decode_values,
    mla_decode_values_ref,
    plan_mla_decode,
)
from headrace_kernels.split_plan import plan_splits

from tests.parity.kernels.decode_batch import batch_of, num_pages_of

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MIXED = [70, 0, 200]


def batch(lengths, *, heads=2, dim=32, rope=16, page_size=64, dtype=torch.float32, is_fp8=False, device="cpu"):
    """Return query, cache, block table and context lengths; slots outside a context are NaN."""
    rows = torch.full((num_pages_of(lengths, page_size), page_size, dim + rope), float("nan"))

    def fill(page, used):
        rows[page, :used] = torch.randn(used, dim + rope)

    table, context_lens = batch_of(lengths, page_size, fill, device)
    cache = pack_latents(rows, dim, rope) if is_fp8 else rows.to(dtype)
    query = torch.randn(len(lengths), heads, dim + rope).to(dtype)
    return query.to(device), cache.to(device), table, context_lens


def assert_close(found, expected):
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "is_fp8", "num_splits"),
    [
        (torch.float32, False, None),
        (torch.float32, True, 3),
        (torch.bfloat16, False, 1),
        (torch.bfloat16, True, None),
    ],
)
def test_equals_the_specification(dtype, is_fp8, num_splits, device):
    arguments = batch(MIXED, dim=200 if is_fp8 else 32, dtype=dtype, is_fp8=is_fp8, device=device)
    constants = {"kv_lora_rank": arguments[0].shape[2] - 16, "scale": 0.3}
    found = mla_decode(*arguments, **constants, num_splits=num_splits)
    assert_close(found, mla_decode_ref(*arguments, **constants))
    assert torch.count_nonzero(found[1]) == 0, "no context gives zeros"


@pytest.mark.parametrize(("heads", "dim", "rope", "page_size"), [(1, 16, 8, 16), (17, 24, 4, 48), (2, 32, 16, 128)])
def test_odd_heads_widths_and_pages(heads, dim, rope, page_size, device):
    arguments = batch([130], heads=heads, dim=dim, rope=rope, page_size=page_size, device=device)
    found = mla_decode(*arguments, kv_lora_rank=dim, scale=0.3)
    assert_close(found, mla_decode_ref(*arguments, kv_lora_rank=dim, scale=0.3))


@pytest.mark.parametrize("is_fp8", [False, True])
def test_the_real_widths(is_fp8, device):
    arguments = batch([100], heads=16, dim=512, rope=64, dtype=torch.bfloat16, is_fp8=is_fp8, device=device)
    found = mla_decode(*arguments, kv_lora_rank=512, scale=0.05)
    assert_close(found, mla_decode_ref(*arguments, kv_lora_rank=512, scale=0.05))


def test_a_plan_made_before_gives_the_same_bits(device):
    arguments = batch(MIXED, device=device)
    plan = plan_mla_decode(arguments[3], 64, 2)
    constants = {"kv_lora_rank": 32, "scale": 0.3}
    assert torch.equal(mla_decode(*arguments, **constants, plan=plan), mla_decode(*arguments, **constants))


@pytest.mark.parametrize("num_programs", [1, 9])
def test_any_plan_gives_the_specification(num_programs, device):
    arguments = batch([300, 0, 330], device=device)
    plan = plan_splits(arguments[3], 64, num_programs=num_programs)
    found = mla_decode(*arguments, kv_lora_rank=32, scale=0.3, plan=plan)
    assert_close(found, mla_decode_ref(*arguments, kv_lora_rank=32, scale=0.3))


@pytest.mark.parametrize("num_splits", [3])
def test_with_a_number_of_splits_a_row_does_not_depend_on_the_batch(num_splits, device):
    query, cache, table, lens = batch(MIXED, dtype=torch.bfloat16, device=device)
    w_uv = torch.randn(2, 20, 32, device=device).to(torch.bfloat16)
    constants = {"scale": 0.3, "num_splits": num_splits}
    latents = mla_decode(query, cache, table, lens, kv_lora_rank=32, **constants)
    values = mla_decode_values(query, cache, table, lens, w_uv, **constants)
    for b in range(len(MIXED)):
        one = (query[b : b + 1], cache, table[b : b + 1], lens[b : b + 1])
        assert torch.equal(mla_decode(*one, kv_lora_rank=32, **constants)[0], latents[b])
        assert torch.equal(mla_decode_values(*one, w_uv, **constants)[0], values[b])


@pytest.mark.parametrize(
    ("lengths", "num_splits", "dtype"),
    [
        ([700], None, torch.bfloat16),
        (MIXED, None, torch.float32),
        ([9] * 18, None, torch.float32),
        (MIXED, 3, torch.bfloat16),
    ],
)
def test_values_equal_their_specification(lengths, num_splits, dtype, device):
    """One row of many splits, rows of few, more rows than a tile has, a fixed number."""
    arguments = batch(lengths, heads=2, dtype=dtype, device=device)
    w_uv = torch.randn(2, 20, 32, device=device).to(dtype) / 6
    found = mla_decode_values(*arguments, w_uv, scale=0.3, num_splits=num_splits)
    assert_close(found, mla_decode_values_ref(*arguments, w_uv, scale=0.3))


def test_queries_of_a_wider_tensor(device):
    """As a projection gives them; NaN beside them must not be read."""
    query, *rest = batch([65, 3], device=device)
    wide = torch.full((2, 4, 60), float("nan"), device=device)
    wide[:, 1:3, 7:55] = query
    found = mla_decode(wide[:, 1:3, 7:55], *rest, kv_lora_rank=32, scale=0.3)
    assert torch.equal(found, mla_decode(query, *rest, kv_lora_rank=32, scale=0.3))


def test_no_rows(device):
    arguments = batch([], device=device)
    assert mla_decode(*arguments, kv_lora_rank=32, scale=0.3).shape == (0, 2, 32)
    assert mla_decode_values(*arguments, torch.ones(2, 4, 32, device=device), scale=0.3).shape == (0, 8)


def test_refuses_what_does_not_fit(device):
    query, cache, table, lens = batch([5, 70], device=device)
    plan = plan_mla_decode(lens, 64, 2)
    constants = {"kv_lora_rank": 32, "scale": 0.3}
    with pytest.raises(ValueError, match="multiple of 16"):
        mla_decode(query, cache[:, :40].contiguous(), table, lens, **constants)
    with pytest.raises(ValueError, match="do not fit"):
        mla_decode(query, cache.to(torch.bfloat16), table, lens, **constants)
    with pytest.raises(ValueError, match="do not fit"):
        mla_decode(query, cache[:, :32], table, lens, **constants)
    with pytest.raises(ValueError, match="block_table"):
        mla_decode(query, cache, table.long(), lens, **constants)
    with pytest.raises(ValueError, match="not both"):
        mla_decode(query, cache, table, lens, **constants, plan=plan, num_splits=2)
    with pytest.raises(ValueError, match="positive"):
        mla_decode(query, cache, table, lens, **constants, num_splits=0)
    with pytest.raises(ValueError, match="a plan for 2 rows"):
        mla_decode(query[:1], cache, table[:1], lens[:1], **constants, plan=plan)
    with pytest.raises(ValueError, match="w_uv"):
        mla_decode_values(query, cache, table, lens, torch.ones(3, 4, 32, device=device), scale=0.3)
