"""What lies between a decode row's projections and its latent attention."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.mla_prologue import mla_prologue, mla_prologue_ref

from tests.parity.cpu_kernels.inputs import NAN, assert_near, on_threads, plain, random

# B, H, Dn, R, D
SHAPES = [(1, 1, 8, 4, 16), (5, 3, 9, 6, 41), (13, 7, 16, 16, 130), (2, 2, 1, 2, 1)]
SLOTS = 40


class Rows:
    def __init__(self, shape, dtype):
        num_rows, heads, nope, rope, latent = shape
        self.query = random(num_rows, heads, nope + rope, dtype=dtype)
        # As views of one weight [H, Dn + Dv, D], as a checkpoint has it.
        self.w_uk = plain(heads, nope + 3, latent, dtype=dtype, scale=nope**-0.5)[:, :nope]
        joined = random(num_rows, latent + rope, dtype=dtype)
        self.c_kv, self.k_pe = joined[:, :latent], joined[:, latent:]
        self.norm = plain(latent, dtype=dtype)
        angles = torch.randn(num_rows, rope // 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.slots = torch.randperm(SLOTS)[:num_rows]
        self.dtype, self.width = dtype, latent + rope

    def run(self, rows=slice(None), *, is_interleaved=True, function=mla_prologue, dtype=None):
        """The absorbed queries, and a cache of NaN with what was stored."""
        dtype = dtype or self.dtype
        cache = torch.full((SLOTS, self.width + 3), NAN, dtype=dtype)[:, : self.width]
        tensors = self.query[rows], self.w_uk, self.c_kv[rows], self.k_pe[rows], self.norm
        query = function(
            *(each.to(dtype) for each in tensors),
            self.cos[rows],
            self.sin[rows],
            cache,
            self.slots[rows],
            eps=1e-6,
            is_interleaved=is_interleaved,
        )
        return query, cache


@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_its_specification(shape, is_interleaved, dtype):
    rows = Rows(shape, dtype)
    if len(rows.slots) > 1:
        rows.slots[1] = -1
    kept = rows.slots >= 0
    query, cache = rows.run(is_interleaved=is_interleaved)
    expected, stored = rows.run(is_interleaved=is_interleaved, function=mla_prologue_ref, dtype=torch.float32)
    assert_near(query[kept], expected[kept])
    assert_near(cache[rows.slots[kept]], stored[rows.slots[kept]])
    left = torch.ones(SLOTS, dtype=torch.bool)
    left[rows.slots[kept]] = False
    assert cache[left].isnan().all(), "nothing is stored for padding, nor beside a row"


def test_no_rows_store_nothing(dtype):
    query, cache = Rows((3, 2, 8, 4, 16), dtype).run(slice(0, 0))
    assert query.shape == (0, 2, 20)
    assert cache.isnan().all()


def test_a_row_is_the_same_in_any_batch_on_any_threads(dtype):
    rows = Rows((13, 3, 9, 6, 41), dtype)
    whole, stored = rows.run()
    for threads in (1, 2, 3):
        query, cache = on_threads(threads, rows.run)
        assert torch.equal(query, whole)
        assert torch.equal(cache[rows.slots], stored[rows.slots])
    for some in (slice(0, 1), slice(2, 5), slice(4, 13)):
        query, cache = rows.run(some)
        assert torch.equal(query, whole[some])
        assert torch.equal(cache[rows.slots[some]], stored[rows.slots[some]])


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("spoilt", ["query", "c_kv", "k_pe"])
def test_what_is_not_finite_spoils_its_row_alone(spoilt, value, dtype):
    rows = Rows((5, 3, 9, 6, 41), dtype)
    whole, stored = rows.run()
    getattr(rows, spoilt)[2, ..., 1] = value
    query, cache = rows.run()
    others = [0, 1, 3, 4]
    assert torch.equal(query[others], whole[others])
    assert torch.equal(cache[rows.slots[others]], stored[rows.slots[others]])
    row = cache[rows.slots[2]]
    if spoilt == "query":
        assert not query[2, :, :41].isfinite().any()
    else:
        parts = {"c_kv": row[:41], "k_pe": row[41:]}
        assert parts.pop(spoilt).isnan().all(), "NaN throughout"
        assert all(part.isfinite().all() for part in parts.values())
