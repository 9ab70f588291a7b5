"""Quantising activations against its specification."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.act_quant import act_quant, act_quant_ref, dequantise

from tests.parity.kernels.moe_cases import blocks_of, live_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2048), (2, 200), (1, 1), (0, 128)])
def test_equals_the_specification_to_the_bit(shape, dtype, device):
    x = (torch.randn(shape, device=device) * torch.logspace(-3, 3, shape[1], device=device)).to(dtype)
    values, scales = act_quant(x)
    expected, expected_scales = act_quant_ref(x)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales)


def test_every_number_of_fp8_stays_itself_and_what_lies_between_goes_to_the_nearest(device):
    numbers = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat((numbers, between, between * 1.0001, -between * 0.9999)).to(device)
    x = torch.cat((x, x.new_zeros(-len(x) % 127))).view(-1, 127)
    x = torch.cat((x, x.new_full((len(x), 1), 448.0)), dim=1)
    values, scales = act_quant(x)
    assert torch.equal(scales, torch.ones_like(scales))
    assert torch.equal(values.float(), x.to(torch.float8_e4m3fn).float())


def test_undone_it_is_near(device):
    x = torch.randn(4, 300, device=device)
    values, scales = act_quant(x)
    # Three bits of mantissa: at most 1/16 off, and half of the smallest step near zero.
    torch.testing.assert_close(dequantise(values, scales), x, rtol=1 / 16, atol=float(scales.max()) * 2**-10)


def test_zeros_stay_zeros(device):
    values, scales = act_quant(torch.zeros(2, 128, device=device))
    assert not values.float().any()
    assert torch.isfinite(scales).all()


def test_rows_of_a_wider_tensor(device):
    wide = torch.full((3, 160), float("nan"), device=device)
    wide[:, 16:144] = torch.randn(3, 128, device=device)
    values, scales = act_quant(wide[:, 16:144])
    expected, expected_scales = act_quant_ref(wide[:, 16:144])
    assert torch.equal(values.float(), expected.float())
    assert torch.equal(scales, expected_scales)


def test_rows_of_padding_are_left_alone(device):
    blocks = blocks_of(torch.tensor([[0, 1], [1, 2]], device=device), 3)
    is_live = live_rows(blocks)
    x = torch.full((len(is_live), 130), float("nan"), device=device)
    x[is_live] = torch.randn(4, 130, device=device)
    values, scales = act_quant(x, blocks)
    expected, expected_scales = act_quant_ref(x[is_live])
    assert torch.equal(values[is_live].float(), expected.float())
    assert torch.equal(scales[is_live], expected_scales)


def test_what_does_not_fit_is_refused(device):
    with pytest.raises(ValueError, match="contiguous rows"):
        act_quant(torch.zeros(4, 4, device=device).t()[:, ::2])
    with pytest.raises(ValueError, match="blocks"):
        act_quant(torch.zeros(4, 4, device=device), blocks_of(torch.tensor([[0]], device=device), 1))
