"""The fp8 row of the latent cache: its bytes, and how much of a value it keeps."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.latent_fp8 import pack_latents, row_bytes, unpack_latents


def test_the_row_of_deepseek_has_656_bytes():
    assert row_bytes(512, 64) == 656


def test_the_parts_lie_where_the_format_says(device):
    row = torch.zeros(1, 256 + 4, device=device)
    row[0, :2] = torch.tensor([448.0, 1.0])
    row[0, 128] = -896.0
    row[0, 256:] = torch.arange(4.0)
    packed = pack_latents(row, 256, 4)[0]
    assert packed[:256].view(torch.float8_e4m3fn).float()[[0, 1, 128]].tolist() == [448.0, 1.0, -448.0]
    assert packed[256:264].view(torch.float32).tolist() == [1.0, 2.0]
    assert packed[264:].view(torch.bfloat16).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_values_come_back_within_the_precision_of_fp8(device):
    rows = torch.randn(3, 5, 512 + 64, device=device) * torch.logspace(-6, 6, 5, device=device)[:, None]
    back = unpack_latents(pack_latents(rows, 512, 64), 512, 64)
    torch.testing.assert_close(back[..., 512:], rows[..., 512:].to(torch.bfloat16).float(), rtol=0, atol=0)
    # Three bits of mantissa: half a step of 1/8 of the value, or of the smallest subnormal, 2**-9 of the scale.
    error = (back - rows)[..., :512].abs()
    scale = rows[..., :512].unflatten(-1, (-1, 128)).abs().amax(-1, keepdim=True).expand(3, 5, 4, 128).flatten(-2) / 448
    assert bool((error <= torch.maximum(rows[..., :512].abs() / 16, scale * 2**-10) * 1.0001).all())


def test_zeros_stay_zeros(device):
    rows = torch.zeros(2, 128 + 2, device=device)
    assert torch.equal(unpack_latents(pack_latents(rows, 128, 2), 128, 2), rows)


def test_an_empty_cache_is_packed(device):
    assert pack_latents(torch.zeros(0, 130, device=device), 128, 2).shape == (0, 128 + 4 + 4)


@pytest.mark.parametrize(("kv_lora_rank", "rope_dim"), [(0, 64), (100, 64), (128, 3), (128, -2)])
def test_widths_that_the_format_cannot_hold(kv_lora_rank, rope_dim):
    with pytest.raises(ValueError, match="fp8 row"):
        row_bytes(kv_lora_rank, rope_dim)


def test_rows_of_another_width():
    with pytest.raises(ValueError, match="do not fit"):
        pack_latents(torch.zeros(1, 128), 128, 2)
    with pytest.raises(ValueError, match="no fp8 cache"):
        unpack_latents(torch.zeros(1, 135, dtype=torch.uint8), 128, 2)
