"""The fp8 row of the latent cache: its bytes, and how much of a value it keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from headrace_kernels.fp8_groups import SMALLEST_MAXIMUM
from headrace_kernels.latent_fp8 import pack_latents, row_bytes, unpack_latents

NAN, INF = float("nan"), float("inf")


def test_the_row_of_deepseek_has_656_bytes():
    assert row_bytes(512, 64) == 656


@pytest.mark.parametrize(("kv_lora_rank", "rope_dim", "size"), [(64, 32, 132), (16, 8, 36), (200, 6, 220), (4, 0, 8)])
def test_the_last_scale_is_that_of_the_columns_that_are_left(kv_lora_rank, rope_dim, size, device):
    assert row_bytes(kv_lora_rank, rope_dim) == size
    rows = torch.randn(3, kv_lora_rank + rope_dim, device=device)
    wide = torch.cat((rows[:, :kv_lora_rank], torch.zeros(3, -kv_lora_rank % 128, device=device)), dim=1)
    packed, padded = pack_latents(rows, kv_lora_rank, rope_dim), pack_latents(wide, wide.shape[1], 0)
    assert torch.equal(packed[:, :kv_lora_rank], padded[:, :kv_lora_rank])
    scales = slice(kv_lora_rank, size - 2 * rope_dim)
    assert torch.equal(packed[:, scales], padded[:, wide.shape[1] :])


def nearest_fp8(values):
    """The byte of the e4m3 number nearest to each of `values`, float32; of two as near, the one with an even byte."""
    bytes_ = np.arange(0x7F)
    exponents, mantissas = bytes_ >> 3, bytes_ & 7
    numbers = np.where(exponents == 0, mantissas * 2.0**-9, (8 + mantissas) * 2.0 ** (exponents - 10.0))
    distances = np.abs(np.abs(values.astype(np.float64))[..., None] - numbers)
    nearest = distances == distances.min(axis=-1, keepdims=True)
    even = np.where(nearest & (bytes_ % 2 == 0), bytes_, -1).max(axis=-1)
    return np.where(even >= 0, even, nearest.argmax(axis=-1)) | np.where(np.signbit(values), 0x80, 0)


def test_every_byte_is_what_the_format_says(device):
    """Against a second statement of it: a table of e4m3's numbers, and IEEE divisions in float32."""
    rows = torch.randn(6, 256 + 8) * torch.logspace(-12, 30, 6)[:, None]
    rows[1, ::3] *= 1e-4  # numbers below the smallest normal one of their group
    rows[2, :128] = torch.arange(128.0) * 448 / 127 - 100  # ties among them
    packed = pack_latents(rows.to(device), 256, 8).cpu().numpy()
    groups = rows[:, :256].numpy().reshape(6, 2, 128)
    largest = np.maximum(np.abs(groups).max(axis=2, keepdims=True), np.float32(SMALLEST_MAXIMUM))
    values = groups * (np.float32(448) / largest)
    np.testing.assert_array_equal(packed[:, :256], nearest_fp8(values).reshape(6, 256))
    np.testing.assert_array_equal(packed[:, 256:264].copy().view("<f4"), (largest / np.float32(448))[..., 0])
    rope = rows[:, 256:].to(torch.bfloat16).view(torch.uint8).numpy()
    np.testing.assert_array_equal(packed[:, 264:], rope)


@pytest.mark.parametrize("largest", [3.4e38, 449.0, 448.0, 1.0, 1e-30, 1e-40])
def test_the_largest_of_a_group_is_448_of_its_scale_and_never_nan(largest, device):
    """e4m3fn has no infinity: what is beyond 448 would be NaN."""
    rows = torch.zeros(1, 128, device=device)
    rows[0, :2] = torch.tensor([largest, -largest])
    packed = pack_latents(rows, 128, 0)
    assert not bool((packed[0, :128] & 0x7F == 0x7F).any())
    if largest > SMALLEST_MAXIMUM:
        assert packed[0, :2].tolist() == [0x7E, 0xFE]
    back = unpack_latents(packed, 128, 0)
    torch.testing.assert_close(back, rows, rtol=1e-6, atol=SMALLEST_MAXIMUM * 2**-10 / 448)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("widths", "column", "spoilt"),
    [
        ((256, 8), 255, slice(128, 256)),
        ((256, 8), 259, slice(256, 264)),
        ((200, 6), 130, slice(128, 200)),
        ((64, 32), 0, slice(64)),
        ((64, 32), 95, slice(64, 96)),
    ],
)
def test_what_is_not_finite_is_nan_in_all_columns_beside_it(value, widths, column, spoilt, device):
    """Those that share its scale, or the rope columns; elsewhere nothing."""
    rows = torch.randn(3, sum(widths), device=device)
    rows[1, column] = value
    back = unpack_latents(pack_latents(rows, *widths), *widths)
    assert bool(back[1, spoilt].isnan().all())
    back[1, spoilt] = 0
    assert bool(back.isfinite().all())


def test_rope_columns_beyond_bfloat16_are_nan(device):
    rows = torch.ones(2, 128 + 4, device=device)
    rows[1, 130] = torch.finfo(torch.float32).max  # bfloat16 would make it an infinity
    back = unpack_latents(pack_latents(rows, 128, 4), 128, 4)
    assert bool(back[1, 128:].isnan().all())
    assert bool(back[0].isfinite().all())


def test_a_page_that_was_never_written_reads_as_zeros(device):
    assert not unpack_latents(torch.zeros(2, row_bytes(64, 32), dtype=torch.uint8, device=device), 64, 32).any()


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


@pytest.mark.parametrize(("kv_lora_rank", "rope_dim"), [(0, 64), (102, 64), (128, 3), (128, -2)])
def test_widths_that_the_format_cannot_hold(kv_lora_rank, rope_dim):
    with pytest.raises(ValueError, match="fp8 row"):
        row_bytes(kv_lora_rank, rope_dim)


def test_rows_of_another_width():
    with pytest.raises(ValueError, match="do not fit"):
        pack_latents(torch.zeros(1, 128), 128, 2)
    with pytest.raises(ValueError, match="no fp8 cache"):
        unpack_latents(torch.zeros(1, 135, dtype=torch.uint8), 128, 2)
