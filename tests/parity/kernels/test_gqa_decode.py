"""Grouped-query attention of decode rows, planned and with a fixed number of splits, against its specification."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.gqa_decode import gqa_decode, gqa_decode_ref, plan_gqa_decode

from tests.parity.kernels.decode_batch import batch_of, num_pages_of

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MIXED = [70, 0, 200]


def batch(lengths, *, heads=4, groups=2, dim=16, page_size=64, dtype=torch.float32, device="cpu"):
    """Return query, cache, block table and context lengths; slots outside a context are NaN."""
    cache = torch.full((num_pages_of(lengths, page_size), 2, page_size, groups, dim), float("nan"))

    def fill(page, used):
        cache[page, :, :used] = torch.randn(2, used, groups, dim)

    table, context_lens = batch_of(lengths, page_size, fill, device)
    query = torch.randn(len(lengths), heads, dim).to(dtype)
    return query.to(device), cache.to(device, dtype), table, context_lens


def assert_close(found, expected):
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "num_splits"), [(torch.float32, None), (torch.float32, 3), (torch.bfloat16, None), (torch.bfloat16, 1)]
)
def test_equals_the_specification(dtype, num_splits, device):
    arguments = batch(MIXED, dtype=dtype, device=device)
    found = gqa_decode(*arguments, scale=0.3, num_splits=num_splits)
    assert_close(found, gqa_decode_ref(*arguments, scale=0.3))
    assert torch.count_nonzero(found[1]) == 0, "no context gives zeros"


@pytest.mark.parametrize(
    ("heads", "groups", "dim", "page_size"),
    [(1, 1, 8, 16), (9, 3, 24, 48), (20, 1, 40, 32), (3, 3, 16, 128)],
)
def test_odd_heads_widths_and_pages(heads, groups, dim, page_size, device):
    arguments = batch([130], heads=heads, groups=groups, dim=dim, page_size=page_size, device=device)
    assert_close(gqa_decode(*arguments, scale=0.3), gqa_decode_ref(*arguments, scale=0.3))


def test_the_real_widths(device):
    """Mixtral's 4 query heads a key/value head of 128."""
    arguments = batch([100], heads=8, groups=2, dim=128, dtype=torch.bfloat16, device=device)
    assert_close(gqa_decode(*arguments, scale=0.09), gqa_decode_ref(*arguments, scale=0.09))


def test_a_plan_made_before_gives_the_same_bits(device):
    arguments = batch(MIXED, device=device)
    plan = plan_gqa_decode(arguments[3], 64, 2)
    assert torch.equal(gqa_decode(*arguments, scale=0.3, plan=plan), gqa_decode(*arguments, scale=0.3))


@pytest.mark.parametrize("num_splits", [3])
def test_with_a_number_of_splits_a_row_does_not_depend_on_the_batch(num_splits, device):
    query, cache, table, lens = batch(MIXED, dtype=torch.bfloat16, device=device)
    whole = gqa_decode(query, cache, table, lens, scale=0.3, num_splits=num_splits)
    for b in range(len(MIXED)):
        one = (query[b : b + 1], cache, table[b : b + 1], lens[b : b + 1])
        assert torch.equal(gqa_decode(*one, scale=0.3, num_splits=num_splits)[0], whole[b])


def test_no_rows(device):
    assert gqa_decode(*batch([], device=device), scale=0.3).shape == (0, 4, 16)


def test_refuses_what_does_not_fit(device):
    query, cache, table, lens = batch([5, 70], device=device)
    with pytest.raises(ValueError, match="multiple of 16"):
        gqa_decode(query, cache[:, :, :40].contiguous(), table, lens, scale=0.3)
    with pytest.raises(ValueError, match="do not fit"):
        gqa_decode(query[:, :3], cache, table, lens, scale=0.3)
    with pytest.raises(ValueError, match="contiguous"):
        gqa_decode(query, cache[:, :, :32], table, lens, scale=0.3)
    with pytest.raises(ValueError, match="context_lens"):
        gqa_decode(query, cache, table, lens.long(), scale=0.3)
    with pytest.raises(ValueError, match="not both"):
        gqa_decode(query, cache, table, lens, scale=0.3, num_splits=2, plan=plan_gqa_decode(lens, 64, 2))
