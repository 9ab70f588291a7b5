"""Linear layers in blocks of FP8 on a GPU: few rows, and many, whose activations are quantised, against plain torch."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.act_quant import act_quant_ref, dequantise
from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.fp8_groups import FP8
from headrace_kernels.gpu import decode_linear
from headrace_kernels.linear import Linear
from headrace_kernels.rms_norm import rms_norm_ref

SHAPES = [(3, 136, 48), (1, 33, 5), (17, 260, 130), (0, 16, 8)]
BLOCKS = [(128, 128), (64, 128), (8, 32)]
NEAR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def fp8_weight(outputs, inputs, block, device):
    values = torch.randn(outputs, inputs).clamp(-2, 2).to(FP8)
    scales = (0.5 + torch.rand(-(-outputs // block[0]), -(-inputs // block[1]))) * inputs**-0.5
    return BlockFp8(values.to(device), scales.to(device), block)


def tensors(shape, dtype, device):
    tokens, inputs, outputs = shape
    sizes = ((tokens, inputs), (inputs,), (outputs,), (tokens, outputs))
    return (torch.randn(size, device=device).to(dtype) for size in sizes)


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_few_rows_are_multiplied_as_they_are(shape, block, dtype, device):
    x, norm, bias, residual = tensors(shape, dtype, device)
    weight = fp8_weight(shape[2], shape[1], block, device)
    layer, dense = Linear(weight, bias, dtype=dtype), weight.to(torch.float32)
    near = {"rtol": NEAR[dtype], "atol": NEAR[dtype]}
    expected = x.float() @ dense.T + bias.float()
    torch.testing.assert_close(layer(x), expected.to(dtype), **near)
    torch.testing.assert_close(layer.added_to(residual, x), (expected + residual.float()).to(dtype), **near)
    normed = rms_norm_ref(x.float(), norm.float(), 1e-6) @ dense.T + bias.float()
    torch.testing.assert_close(layer.after_norm(x, norm, 1e-6), normed.to(dtype), **near)


@pytest.mark.parametrize("tokens", [6, 130])
def test_many_rows_are_quantised(tokens, device, monkeypatch):
    monkeypatch.setattr(decode_linear, "MAX_ROWS", 4)
    x, norm, bias, residual = tensors((tokens, 260, 140), torch.bfloat16, device)
    weight = fp8_weight(140, 260, (128, 128), device)
    layer, dense = Linear(weight, bias, dtype=x.dtype), weight.to(torch.float32)

    def product(rows):
        return dequantise(*act_quant_ref(rows)) @ dense.T + bias.float()

    expected = product(x)
    torch.testing.assert_close(layer(x).float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(layer.added_to(residual, x).float(), expected + residual.float(), rtol=2e-2, atol=4e-2)
    normed = product(rms_norm_ref(x, norm, 1e-6))
    # A value that lies between two of fp8 may be taken for the other one, by one rounding of the norm.
    torch.testing.assert_close(layer.after_norm(x, norm, 1e-6).float(), normed, rtol=5e-2, atol=0.15)
    wide = x.float() @ dense.T + bias.float()
    assert not torch.allclose(layer(x).float(), wide, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, (128, 128)), (torch.bfloat16, (64, 128))])
def test_many_rows_that_kernels_do_not_take_are_dequantised(dtype, block, device, monkeypatch):
    monkeypatch.setattr(decode_linear, "MAX_ROWS", 4)
    x, _, bias, residual = tensors((6, 260, 140), dtype, device)
    weight = fp8_weight(140, 260, block, device)
    expected = x.float() @ weight.to(torch.float32).T + bias.float() + residual.float()
    found = Linear(weight, bias, dtype=dtype).added_to(residual, x)
    torch.testing.assert_close(found, expected.to(dtype), rtol=NEAR[dtype], atol=2 * NEAR[dtype])


def test_columns_that_no_tile_has_are_dequantised(device):
    x, _, bias, _ = tensors((2, 60, 20), torch.bfloat16, device)
    weight = fp8_weight(20, 60, (128, 12), device)
    expected = x.float() @ weight.to(torch.float32).T + bias.float()
    torch.testing.assert_close(Linear(weight, bias, dtype=x.dtype)(x), expected.bfloat16(), rtol=2e-2, atol=2e-2)


def test_plain_torch_reads_what_a_kernel_does(device):
    """As a worker's check before it serves, which computes by both."""
    x, _, bias, _ = tensors((3, 136, 48), torch.bfloat16, device)
    layer = Linear(fp8_weight(48, 136, (128, 128), device), bias, dtype=x.dtype)
    found = layer(x)
    with use_backend("reference"):
        expected = layer(x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
