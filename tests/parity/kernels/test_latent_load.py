"""Reading rows of a latent cache, plain and fp8, against the specification."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.latent_fp8 import pack_latents, row_bytes
from headrace_kernels.latent_load import latent_load, latent_load_ref


def poisoned(rows, widths):
    """Return an fp8 cache with every second row NaN, and the slots of the others, shuffled."""
    cache = torch.full((2 * len(rows), row_bytes(*widths)), 0xFF, dtype=torch.uint8, device=rows.device)
    slots = torch.randperm(len(rows), device=rows.device) * 2 + 1
    cache[slots] = pack_latents(rows, *widths)
    return cache, slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(512, 64), (64, 32), (200, 6), (384, 0)])
def test_rows_of_an_fp8_cache_equal_the_specification(widths, dtype, device):
    options = {"kv_lora_rank": widths[0], "rope_dim": widths[1], "dtype": dtype}
    cache, slots = poisoned(torch.randn(5, sum(widths), device=device), widths)
    found = latent_load(cache, slots, **options)
    assert found.dtype == dtype
    assert bool(found.isfinite().all())
    # To the bit, but that the interpreter cuts bfloat16 off where a GPU rounds it.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(found, latent_load_ref(cache, slots, **options), rtol=tolerance, atol=0)


def test_a_plain_cache_is_read_as_it_is(device):
    cache, slots = torch.randn(6, 20, device=device), torch.tensor([4, 0, 4], device=device)
    found = latent_load(cache, slots, kv_lora_rank=16, rope_dim=4, dtype=torch.float32)
    assert torch.equal(found, cache[slots])


def test_no_rows(device):
    cache, slots = torch.zeros(3, row_bytes(64, 8), dtype=torch.uint8, device=device), torch.arange(0, device=device)
    assert latent_load(cache, slots, kv_lora_rank=64, rope_dim=8, dtype=torch.float32).shape == (0, 72)


def test_what_does_not_fit(device):
    slots = torch.arange(2, device=device)
    options = {"kv_lora_rank": 64, "rope_dim": 8, "dtype": torch.float32}
    with pytest.raises(ValueError, match="no contiguous rows"):
        latent_load(torch.zeros(3, row_bytes(64, 6), dtype=torch.uint8, device=device), slots, **options)
    with pytest.raises(ValueError, match="no contiguous rows"):
        latent_load(torch.zeros(3, 72, dtype=torch.bfloat16, device=device), slots, **options)
    with pytest.raises(ValueError, match="slots"):
        latent_load(torch.zeros(3, 72, device=device), slots.int(), **options)
