"""Grouped-query attention over pages against its specification, with NaN in every slot of no token."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.gpu.configs import use_config
from headrace_kernels.gqa_prefill import gqa_prefill, gqa_prefill_ref

from tests.parity.kernels.attention_cases import SMALL_TILES, TOLERANCES, nan_around, starts


@pytest.fixture(autouse=True)
def small_tiles():
    with use_config("causal_attention", SMALL_TILES):
        yield


def tensors(queries, keys, heads, dim, page_size, dtype, device):
    """Sequences on pages in no order; pages that no sequence owns lie between them."""
    num_heads, groups = heads
    pages = [-(-length // page_size) for length in keys]
    order = torch.randperm(sum(pages) + 3).tolist()
    cache = torch.full((len(order), 2, page_size, groups, dim), float("nan"), dtype=dtype, device=device)
    slots: list[int] = []
    for length in keys:
        for first in range(0, length, page_size):
            page, used = order.pop(), min(page_size, length - first)
            cache[page, :, :used] = torch.randn(2, used, groups, dim).to(device, dtype)
            slots += range(page * page_size, page * page_size + used)
    query = nan_around((sum(queries), num_heads, dim), dtype, device)
    return query, cache, torch.tensor(slots, dtype=torch.int64, device=device), starts(queries), starts(keys)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "dim", "page_size"),
    [
        ([34], [70], (4, 1), 128, 64),
        ([4, 1, 6], [4, 40, 11], (4, 2), 6, 4),
        ([33, 0, 3], [33, 0, 35], (2, 2), 24, 5),
        ([2], [3], (1, 1), 80, 16),
    ],
)
def test_equals_the_specification(queries, keys, heads, dim, page_size, dtype, device):
    arguments = tensors(queries, keys, heads, dim, page_size, dtype, device)
    found, expected = (f(*arguments, scale=dim**-0.5) for f in (gqa_prefill, gqa_prefill_ref))
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_a_sequence_does_not_depend_on_where_its_pages_lie(device):
    query, cache, slots, query_starts, key_starts = tensors([5], [40], (2, 1), 16, 8, torch.float32, device)
    scattered = gqa_prefill(query, cache, slots, query_starts, key_starts, scale=0.3)
    rows = cache.transpose(1, 2).reshape(-1, 2, 1, 16)[slots]
    in_order = rows.view(-1, 8, 2, 1, 16).transpose(1, 2).contiguous()
    slots = torch.arange(40, device=device)
    assert torch.equal(gqa_prefill(query, in_order, slots, query_starts, key_starts, scale=0.3), scattered)


def test_what_does_not_fit_is_refused(device):
    query, cache, slots, one, two = tensors([2], [4], (2, 2), 16, 4, torch.float32, device)
    with pytest.raises(ValueError, match="do not fit"):
        gqa_prefill(query[..., :8], cache, slots, one, two, scale=1.0)
    with pytest.raises(ValueError, match="int64"):
        gqa_prefill(query, cache, slots.int(), one, two, scale=1.0)
    with pytest.raises(ValueError, match="end at 2 queries and 3 keys"):
        gqa_prefill(query, cache, slots[:3], one, two, scale=1.0)
