"""Linear layers with a norm before or a residual after them, against their specifications."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.decode_linear import linear_add, linear_add_ref, norm_linear, norm_linear_ref
from headrace_kernels.gpu import decode_linear as gpu

DTYPES = [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)]
SHAPES = [(3, 64, 48), (1, 33, 5), (17, 40, 70), (0, 16, 8), (70, 24, 16)]


def tensors(shape, dtype, device):
    tokens, inputs, outputs = shape
    shapes = ((tokens, inputs), (inputs,), (outputs, inputs), (outputs,), (tokens, outputs))
    x, norm_weight, weight, bias, residual = (torch.randn(s, device=device).to(dtype) for s in shapes)
    return x, norm_weight, (weight / inputs**0.5).to(dtype), bias, residual


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_linear(shape, dtype, tolerance, device):
    x, norm_weight, weight, bias, _ = tensors(shape, dtype, device)
    for arguments in ((norm_weight, weight, 1e-6, None), (None, weight, 1e-2, bias)):
        found, expected = norm_linear(x, *arguments), norm_linear_ref(x, *arguments)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_add(shape, dtype, tolerance, device):
    x, _, weight, bias, residual = tensors(shape, dtype, device)
    kept = residual.clone()
    for with_bias in (None, bias):
        found, expected = linear_add(x, weight, residual, with_bias), linear_add_ref(x, weight, residual, with_bias)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(residual, kept)


def test_a_real_layer(device):
    """The width of DeepSeek-V2-Lite, some of its outputs."""
    x, norm_weight, weight, _, residual = tensors((2, 2048, 160), torch.bfloat16, device)
    found, expected = linear_add(x, weight, residual), linear_add_ref(x, weight, residual)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found, expected = norm_linear(x, norm_weight, weight, 1e-6), norm_linear_ref(x, norm_weight, weight, 1e-6)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_columns_beside_a_slice_are_not_read(device):
    def column_slice(*shape):
        wide = torch.full((shape[0] + 2, shape[1] + 8), float("nan"), device=device)
        wide[1:-1, 4:-4] = torch.randn(shape, device=device)
        return wide[1:-1, 4:-4]

    x, weight, residual = column_slice(3, 20), column_slice(18, 20), column_slice(3, 18)
    torch.testing.assert_close(linear_add(x, weight, residual), linear_add_ref(x, weight, residual))
    norm_weight = torch.randn(20, device=device)
    torch.testing.assert_close(norm_linear(x, norm_weight, weight, 1e-6), norm_linear_ref(x, norm_weight, weight, 1e-6))


def test_a_row_does_not_depend_on_the_others(device):
    """Within a tile of tokens, bit for bit, though another row be NaN."""
    x, norm_weight, weight, _, residual = tensors((4, 96, 40), torch.float32, device)
    x[1] = float("nan")
    normed, added = norm_linear(x, norm_weight, weight, 1e-6), linear_add(x, weight, residual)
    assert normed[1].isnan().all()
    for row in (0, 2, 3):
        one = slice(row, row + 1)
        assert torch.equal(norm_linear(x[one], norm_weight, weight, 1e-6)[0], normed[row])
        assert torch.equal(linear_add(x[one], weight, residual[one])[0], added[row])


def test_many_tokens_take_the_composition(device, monkeypatch):
    monkeypatch.setattr(gpu, "MAX_ROWS", 4)
    x, norm_weight, weight, bias, residual = tensors((5, 32, 24), torch.float32, device)
    found, expected = norm_linear(x, None, weight, 1e-6, bias), norm_linear_ref(x, None, weight, 1e-6, bias)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(norm_linear(x, norm_weight, weight, 1e-6), norm_linear_ref(x, norm_weight, weight, 1e-6))
    torch.testing.assert_close(linear_add(x, weight, residual), linear_add_ref(x, weight, residual))


def test_what_does_not_fit_is_refused(device):
    x, norm_weight, weight, bias, residual = tensors((3, 8, 4), torch.float32, device)
    bad_calls = [
        lambda: norm_linear(x, norm_weight[1:], weight, 1e-6),
        lambda: norm_linear(x, norm_weight, weight.bfloat16(), 1e-6),
        lambda: norm_linear(x.half(), norm_weight.half(), weight.half(), 1e-6),
        lambda: norm_linear(x, norm_weight, weight, 1e-6, bias[1:]),
        lambda: linear_add(x, weight[:, 1:], residual),
        lambda: linear_add(x, weight, residual[1:]),
        lambda: linear_add(x, weight.T.contiguous().T, residual),
    ]
    for call in bad_calls:
        with pytest.raises(ValueError, match=r"fit|contiguous|float32"):
            call()
