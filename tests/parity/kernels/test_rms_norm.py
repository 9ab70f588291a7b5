"""RMS norm, alone and after a residual, against its specification."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
SHAPES = pytest.mark.parametrize("shape", [(1, 2048), (5, 33), (3, 1), (0, 16)])


def _slice_of_nans(num_rows, width, device):
    """A column slice, as the projections give it; NaN in the columns beside it must not be read."""
    wide = torch.full((num_rows, width + 16), float("nan"), device=device)
    wide[:, 8 : width + 8] = torch.randn(num_rows, width, device=device)
    return wide[:, 8 : width + 8]


@DTYPES
@SHAPES
def test_equals_the_specification(shape, dtype, tolerance, device):
    x, weight = torch.randn(shape, device=device).to(dtype), torch.rand(shape[1], device=device).to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5), rtol=tolerance, atol=tolerance)


@DTYPES
@SHAPES
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_sum_equals_the_specification(backend, shape, dtype, tolerance, device):
    x, residual = torch.randn(2, *shape, device=device).to(dtype)
    weight = torch.rand(shape[1], device=device).to(dtype)
    with use_backend(backend):
        found = add_rms_norm(x, residual, weight, 1e-5)
    expected = add_rms_norm_ref(x, residual, weight, 1e-5)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_the_sum_is_rounded_before_it_is_normalised(device):
    """1 + 2**-9 is 1 in bfloat16: a row of ones, whose norm is its weight."""
    x, weight = torch.ones(1, 64, dtype=torch.bfloat16, device=device), torch.ones(64, device=device).bfloat16()
    found, total = add_rms_norm(x, x * 2.0**-9, weight, 0.0)
    assert torch.equal(total, x)
    assert torch.equal(found, x)


def test_rows_of_a_wider_tensor(device):
    x, residual, weight = (*(_slice_of_nans(4, 32, device) for _ in range(2)), torch.rand(32, device=device))
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6))
    expected = add_rms_norm_ref(x, residual, weight, 1e-6)
    torch.testing.assert_close(add_rms_norm(x, residual, weight, 1e-6), expected)


def test_a_row_does_not_depend_on_the_batch(device):
    x, weight = torch.randn(7, 100, device=device), torch.rand(100, device=device)
    whole = rms_norm(x, weight, 1e-6)
    assert all(torch.equal(rms_norm(x[i : i + 1], weight, 1e-6)[0], whole[i]) for i in range(7))


def test_what_does_not_fit(device):
    x, weight = torch.zeros(2, 8, device=device), torch.zeros(8, device=device)
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm(x, weight[:4], 1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm(x, weight.double(), 1e-6)
    with pytest.raises(ValueError, match="is added to"):
        add_rms_norm(x, x[:1], weight, 1e-6)
    with pytest.raises(ValueError, match="is added to"):
        add_rms_norm(x, x.double(), weight, 1e-6)
