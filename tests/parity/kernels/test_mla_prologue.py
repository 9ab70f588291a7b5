"""The decode prologue of latent attention against its specification."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.latent_fp8 import row_bytes, unpack_latents
from headrace_kernels.mla_prologue import mla_prologue, mla_prologue_ref

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class _Step:
    """Inputs as the projections give them: slices of wider tensors, with NaN beside them."""

    def __init__(self, shape, dtype, device):
        num_rows, num_heads, nope_dim, rope_dim, latent_dim = shape
        self.widths, self.dtype, self.device = (latent_dim, rope_dim), dtype, device
        heads = torch.full((num_rows, num_heads, nope_dim + rope_dim + 8), float("nan"), device=device).to(dtype)
        heads[..., 8:] = torch.randn(num_rows, num_heads, nope_dim + rope_dim, device=device).to(dtype)
        self.query = heads[..., 8:]
        self.w_uk = (torch.randn(num_heads, nope_dim, latent_dim, device=device) * nope_dim**-0.5).to(dtype)
        wide = torch.full((num_rows, 16 + latent_dim + rope_dim), float("nan"), device=device).to(dtype)
        wide[:, 16:] = torch.randn(num_rows, latent_dim + rope_dim, device=device).to(dtype)
        self.c_kv, self.k_pe = wide[:, 16:].split([latent_dim, rope_dim], dim=1)
        self.norm_weight = torch.rand(latent_dim, device=device).to(dtype)
        turn = torch.rand(num_rows, rope_dim // 2, device=device) * 100
        self.cos, self.sin = turn.cos(), turn.sin()

    def run(self, function, slots, *, is_fp8=False, is_interleaved=True, rows=slice(None)):
        """Return the queries and the cache that `function` leaves."""
        width, dtype = (row_bytes(*self.widths), torch.uint8) if is_fp8 else (sum(self.widths), self.dtype)
        cache = torch.full((5, width), 77, dtype=dtype, device=self.device)
        new = (self.c_kv[rows], self.k_pe[rows], self.norm_weight, self.cos[rows], self.sin[rows])
        slots = torch.tensor(slots, dtype=torch.int64, device=self.device)
        options = {"eps": 1e-6, "is_interleaved": is_interleaved}
        return function(self.query[rows], self.w_uk, *new, cache, slots, **options), cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("shape", [(3, 2, 128, 64, 512), (3, 5, 12, 6, 40), (2, 1, 16, 2, 96)])
def test_equals_the_specification(shape, is_interleaved, dtype, device):
    step, slots = _Step(shape, dtype, device), [4, -1, 0][: shape[0]]
    found, expected = (step.run(f, slots, is_interleaved=is_interleaved) for f in (mla_prologue, mla_prologue_ref))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert bool((found[1][1:4] == 77).all())


def test_an_fp8_cache(device):
    step = _Step((3, 2, 16, 8, 256), torch.bfloat16, device)
    found, expected = (step.run(f, [3, -1, 1], is_fp8=True) for f in (mla_prologue, mla_prologue_ref))
    torch.testing.assert_close(found[0], expected[0], rtol=3e-2, atol=3e-2)
    assert bool((found[1][[0, 2, 4]] == 77).all())
    stored, should = (unpack_latents(cache[[1, 3]], 256, 8) for cache in (found[1], expected[1]))
    # Rounding may differ by one step of fp8, an eighth.
    torch.testing.assert_close(stored, should, rtol=0.13, atol=2e-2)


@pytest.mark.parametrize("is_fp8", [False, True], ids=["plain", "fp8"])
def test_the_cpus_own_path_equals_the_specification(is_fp8, device):
    step = _Step((3, 2, 16, 8, 128), torch.float32, device)
    with use_backend("reference"):
        found = step.run(mla_prologue, [3, -1, 1], is_fp8=is_fp8)
    queries, cache = step.run(mla_prologue_ref, [3, -1, 1], is_fp8=is_fp8)
    torch.testing.assert_close(found[0], queries)
    if is_fp8:
        torch.testing.assert_close(
            unpack_latents(found[1][[1, 3]], 128, 8), unpack_latents(cache[[1, 3]], 128, 8), rtol=0.13, atol=1e-3
        )
    else:
        torch.testing.assert_close(found[1], cache)


def test_more_rows_than_a_tile(device):
    """Rows past the first tile of queries, and heads past the first block of the rotation."""
    step = _Step((35, 1, 16, 2, 16), torch.float32, device)
    found, expected = (step.run(f, [2] + [-1] * 34) for f in (mla_prologue, mla_prologue_ref))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    step = _Step((1, 33, 16, 2, 16), torch.float32, device)
    found, expected = (step.run(f, [2]) for f in (mla_prologue, mla_prologue_ref))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_padding_may_hold_anything(device):
    step = _Step((3, 2, 16, 8, 32), torch.float32, device)
    expected = step.run(mla_prologue, [4, -1, 0])
    for tensor in (step.query, step.c_kv, step.k_pe, step.cos, step.sin):
        tensor[1] = float("nan")
    found = step.run(mla_prologue, [4, -1, 0])
    assert torch.equal(found[0][[0, 2]], expected[0][[0, 2]])
    assert torch.equal(found[1], expected[1])


def test_a_row_does_not_depend_on_the_batch(device):
    step = _Step((3, 2, 64, 8, 128), torch.float32, device)
    queries, cache = step.run(mla_prologue, [0, 1, 2])
    for i in range(3):
        alone, own_cache = step.run(mla_prologue, [i], rows=slice(i, i + 1))
        assert torch.equal(alone[0], queries[i])
        assert torch.equal(own_cache[i], cache[i])


def test_no_rows(device):
    queries, cache = _Step((0, 2, 16, 8, 32), torch.float32, device).run(mla_prologue, [])
    assert queries.shape == (0, 2, 40)
    assert bool((cache == 77).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda step: setattr(step, "query", step.query[:, :1]), "do not fit"),
        (lambda step: setattr(step, "w_uk", step.w_uk[..., :16]), "do not fit"),
        (lambda step: setattr(step, "k_pe", step.k_pe[:, :4]), "do not fit"),
        (lambda step: setattr(step, "w_uk", step.w_uk.double()), "w_uk torch.float64"),
        (lambda step: setattr(step, "w_uk", step.w_uk.mT.contiguous().mT), "must be contiguous"),
    ],
)
def test_what_does_not_fit(change, message, device):
    step = _Step((2, 2, 16, 8, 32), torch.float32, device)
    change(step)
    with pytest.raises(ValueError, match=message):
        step.run(mla_prologue, [0, 1])
