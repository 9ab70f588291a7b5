"""Norm and rotation against their specifications."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.rms_norm import rms_norm, rms_norm_ref
from headrace_kernels.rope import rope


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 8), (5, 33)])
def test_rms_norm_equals_its_specification(shape, dtype, tolerance):
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[1]).to(dtype)
    found = rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    torch.testing.assert_close(found, rms_norm_ref(x, weight, 1e-5), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_row_whose_mean_square_is_not_finite_has_no_norm(value, dtype):
    """1e30 is finite, its square is not: divided by infinity the row would be one of zeros."""
    x, weight = torch.randn(3, 9).to(dtype), torch.ones(9, dtype=dtype)
    x[1, 4] = value
    for norm in (rms_norm, rms_norm_ref):
        found = norm(x, weight, 1e-6)
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()


def test_rms_norm_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.zeros(2, 4), torch.zeros(5), 1e-6)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.zeros(2, 4), torch.zeros(4).double(), 1e-6)


def angles(num_tokens, dim):
    table = torch.rand(num_tokens, dim // 2) * 6
    return table.cos(), table.sin()


def test_interleaved_pairs_come_out_in_halves():
    x, (cos, sin) = torch.randn(5, 3, 8), angles(5, 8)
    by_halves = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    found = rope(x, cos, sin, is_interleaved=True)
    assert torch.equal(found, rope(by_halves, cos, sin, is_interleaved=False))


def test_rotation_keeps_lengths_and_scores_depend_on_distance_alone():
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01])

    def at(x, position):
        turn = position * frequencies[None]
        return rope(x, turn.cos(), turn.sin(), is_interleaved=True)

    assert at(query, 7).norm().item() == pytest.approx(query.norm().item(), rel=1e-5)
    near, far = (at(query, p + 5) * at(key, p) for p in (2, 40))
    torch.testing.assert_close(near.sum(), far.sum(), rtol=1e-4, atol=1e-4)


def test_rope_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="cos"):
        rope(torch.zeros(2, 1, 8), *angles(2, 6), is_interleaved=False)
