"""Storing rows in the cache, ready or still to be normalised and rotated, against the specification."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.latent_fp8 import pack_latents, row_bytes, unpack_latents
from headrace_kernels.latent_store import (
    latent_norm_rope_store,
    latent_norm_rope_store_ref,
    latent_store,
    latent_store_ref,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _nan_cache(num_slots, width, dtype, device):
    return torch.full((num_slots, width), float("nan"), device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_rows_are_copied_and_slot_minus_one_is_skipped(dtype, device):
    wide = (torch.randn(4, 600, device=device) * 50).to(dtype)
    rows, slots = wide[:, 7 : 576 + 7], torch.tensor([4, -1, 0, 2], device=device)
    cache = torch.full((5, 576), 3, device=device).to(dtype)
    expected = cache.clone()
    latent_store(rows, cache, slots)
    latent_store_ref(rows, expected, slots)
    assert torch.equal(cache, expected)


def test_any_slot_below_zero_is_skipped(device):
    rows = torch.randn(3, 20, device=device)
    cache = torch.full((6, 20), float("nan"), device=device)
    want = cache.clone()
    slots = torch.tensor([-65, 4, -1], device=device)
    latent_store(rows, cache, slots)
    latent_store_ref(rows, want, slots)
    torch.testing.assert_close(cache, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(cache[4], rows[1])


def test_pages_of_one_layer_among_others(device):
    """A cache whose rows are columns of wider rows: its neighbours stay as they are."""
    whole = torch.zeros(3, 12, device=device)
    latent_store(torch.ones(2, 5, device=device), whole[:, 4:9], torch.tensor([2, 1], device=device))
    expected = torch.zeros(3, 12, device=device)
    expected[1:, 4:9] = 1
    assert torch.equal(whole, expected)


@DTYPES
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_row_that_is_not_finite_is_nan_throughout(backend, dtype, device):
    """Else the score of a key with an infinity may be -inf: a weight of 0, as if the token were not there."""
    slots = torch.arange(3, device=device)
    rows, cache = torch.randn(3, 20, device=device).to(dtype), torch.zeros(3, 20, device=device).to(dtype)
    rows[1, 7] = float("inf")
    new, new_cache = _New(3, 48, 6, dtype, device), torch.zeros(3, 54, device=device).to(dtype)
    new.k_pe[1, 2] = -float("inf")
    with use_backend(backend):
        latent_store(rows, cache, slots)
        latent_norm_rope_store(*new.arguments(), new_cache, slots, eps=1e-6, is_interleaved=True)
    assert torch.equal(cache[[0, 2]], rows[[0, 2]])
    assert cache[1].isnan().all()
    assert new_cache[1, 48:].isnan().all()
    assert new_cache[[0, 2]].isfinite().all()


def test_nothing_to_store(device):
    cache = torch.ones(2, 4, device=device)
    latent_store(torch.zeros(0, 4, device=device), cache, torch.zeros(0, dtype=torch.int64, device=device))
    assert bool((cache == 1).all())


class _New:
    """New latents as a projection gives them: columns of a wider tensor, NaN in the others and in skipped rows."""

    def __init__(self, num_tokens, latent_dim, rope_dim, dtype, device, skipped=()):
        wide = _nan_cache(num_tokens, 8 + latent_dim + rope_dim, dtype, device)
        wide[:, 8:] = (torch.randn(num_tokens, latent_dim + rope_dim, device=device) * 3).to(dtype)
        wide[list(skipped)] = float("nan")
        turn = torch.rand(num_tokens, rope_dim // 2, device=device) * 100
        self.c_kv, self.k_pe = wide[:, 8:].split([latent_dim, rope_dim], dim=1)
        self.norm_weight = torch.rand(latent_dim, device=device).to(dtype)
        self.cos, self.sin = turn.cos(), turn.sin()

    def arguments(self, rows=slice(None)):
        return self.c_kv[rows], self.k_pe[rows], self.norm_weight, self.cos[rows], self.sin[rows]


@DTYPES
@pytest.mark.parametrize("is_interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("widths", [(512, 64), (48, 6)])
def test_new_latents_equal_the_specification(widths, is_interleaved, dtype, device):
    new, slots = _New(3, *widths, dtype, device, skipped=[1]), torch.tensor([4, -1, 0], device=device)
    found, expected = (_nan_cache(5, sum(widths), dtype, device) for _ in range(2))
    options = {"eps": 1e-6, "is_interleaved": is_interleaved}
    latent_norm_rope_store(*new.arguments(), found, slots, **options)
    latent_norm_rope_store_ref(*new.arguments(), expected, slots, **options)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert bool(found[1:4].isnan().all())


@DTYPES
@pytest.mark.parametrize("widths", [(512, 64), (384, 6), (64, 32), (200, 4)])
def test_new_latents_in_fp8(widths, dtype, device):
    new, slots = _New(3, *widths, dtype, device, skipped=[1]), torch.tensor([4, -1, 0], device=device)
    found, expected = (torch.full((5, row_bytes(*widths)), 77, dtype=torch.uint8, device=device) for _ in range(2))
    latent_norm_rope_store(*new.arguments(), found, slots, eps=1e-6, is_interleaved=True)
    latent_norm_rope_store_ref(*new.arguments(), expected, slots, eps=1e-6, is_interleaved=True)
    assert bool((found[1:4] == 77).all())
    # A value beside the middle of two fp8 numbers may be rounded to either: one step, an eighth.
    torch.testing.assert_close(
        unpack_latents(found[[0, 4]], *widths), unpack_latents(expected[[0, 4]], *widths), rtol=0.13, atol=2e-2
    )
    if dtype == torch.float32:
        assert (found != expected)[:, : widths[0]].float().mean() < 0.01


def test_fp8_rows_of_what_is_exact(device):
    """Rows whose norm is 1 and whose values are numbers of fp8: every byte is what the format says."""
    new = _New(2, 256, 8, torch.float32, device)
    new.c_kv.copy_(torch.tensor([1.0, -1.0], device=device).repeat(2, 128))
    new.norm_weight.copy_(torch.tensor([0.5, 2.0, 448.0, 4.0], device=device).repeat(64))
    cache = torch.zeros(2, row_bytes(256, 8), dtype=torch.uint8, device=device)
    latent_norm_rope_store(*new.arguments(), cache, torch.tensor([1, 0], device=device), eps=0.0, is_interleaved=False)
    expected = pack_latents((new.c_kv * new.norm_weight).flip(0), 256, 0)
    assert torch.equal(cache[:, : 256 + 8], expected)


@pytest.mark.parametrize("is_fp8", [False, True], ids=["plain", "fp8"])
def test_a_row_does_not_depend_on_the_batch(is_fp8, device):
    new = _New(3, 256, 8, torch.float32, device)
    cache = torch.zeros(3, row_bytes(256, 8) if is_fp8 else 264, device=device).to(torch.uint8 if is_fp8 else None)
    alone, slots = torch.zeros_like(cache), torch.arange(3, device=device)
    latent_norm_rope_store(*new.arguments(), cache, slots, eps=1e-6, is_interleaved=True)
    for i in range(3):
        row = slice(i, i + 1)
        latent_norm_rope_store(*new.arguments(row), alone, slots[row], eps=1e-6, is_interleaved=True)
    assert torch.equal(alone, cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_pe": (3, 8)}, "do not fit"),
        ({"norm_weight": (8,)}, "do not fit"),
        ({"cos": (2, 3)}, "do not fit"),
        ({"slot_mapping": (3,)}, "do not fit"),
        ({"cache": (4, 135)}, "cannot hold"),
        ({"cache": (4, 136), "cache_dtype": torch.uint8}, "cannot hold"),
        ({"cache": (4, 136), "cache_dtype": torch.float16}, "cannot hold"),
    ],
)
def test_what_does_not_fit(change, message, device):
    shapes = {"c_kv": (2, 128), "k_pe": (2, 8), "norm_weight": (128,), "cos": (2, 4), "sin": (2, 4), "cache": (4, 136)}
    dtypes = {"slot_mapping": torch.int64, "cache": change.pop("cache_dtype", torch.float32)}
    shapes |= {"slot_mapping": (2,)} | change
    tensors = {name: torch.zeros(s, dtype=dtypes.get(name), device=device) for name, s in shapes.items()}
    with pytest.raises(ValueError, match=message):
        latent_norm_rope_store(**tensors, eps=1e-6, is_interleaved=True)


def test_dtypes_and_strides_that_differ(device):
    c_kv, k_pe, weight, cos, sin = _New(2, 16, 4, torch.float32, device).arguments()
    cache, slots = torch.zeros(4, 20, device=device), torch.arange(2, device=device)
    columns = torch.zeros(16, 2, device=device).T
    with pytest.raises(ValueError, match=r"norm_weight torch\.float64"):
        latent_norm_rope_store(c_kv, k_pe, weight.double(), cos, sin, cache, slots, eps=1e-6, is_interleaved=True)
    with pytest.raises(ValueError, match="must be contiguous"):
        latent_norm_rope_store(columns, k_pe, weight, cos, sin, cache, slots, eps=1e-6, is_interleaved=True)
