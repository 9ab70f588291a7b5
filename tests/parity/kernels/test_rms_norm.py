"""RMS norm against its specification."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.rms_norm import rms_norm, rms_norm_ref


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1, 2048), (5, 33), (3, 1), (0, 16)])
def test_equals_the_specification(shape, dtype, tolerance, device):
    x, weight = torch.randn(shape, device=device).to(dtype), torch.rand(shape[1], device=device).to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5), rtol=tolerance, atol=tolerance)


def test_rows_of_a_wider_tensor(device):
    """A column slice, as the projections give it; NaN in the columns beside it must not be read."""
    wide = torch.full((4, 48), float("nan"), device=device)
    wide[:, 8:40] = torch.randn(4, 32, device=device)
    x, weight = wide[:, 8:40], torch.rand(32, device=device)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6))


def test_a_row_does_not_depend_on_the_batch(device):
    x, weight = torch.randn(7, 100, device=device), torch.rand(100, device=device)
    whole = rms_norm(x, weight, 1e-6)
    assert all(torch.equal(rms_norm(x[i : i + 1], weight, 1e-6)[0], whole[i]) for i in range(7))
