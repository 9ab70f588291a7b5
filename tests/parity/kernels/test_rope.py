"""Rotary embedding against its specification."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.rope import rope, rope_ref

ORDERS = pytest.mark.parametrize("is_interleaved", [True, False], ids=["interleaved", "halves"])


def _angles(num_tokens, width, device):
    turn = torch.rand(num_tokens, width // 2, device=device) * 100
    return turn.cos(), turn.sin()


@ORDERS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(2, 40, 64), (3, 5, 2), (2, 1, 20), (0, 4, 16), (2, 0, 16)])
def test_equals_the_specification(shape, dtype, tolerance, is_interleaved, device):
    x, angles = torch.randn(shape, device=device).to(dtype), _angles(shape[0], shape[2], device)
    found, expected = (f(x, *angles, is_interleaved=is_interleaved) for f in (rope, rope_ref))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@ORDERS
def test_the_rope_columns_of_wider_heads(is_interleaved, device):
    """As the query's projection gives them; NaN in the columns before must not be read."""
    heads = torch.full((3, 6, 24), float("nan"), device=device)
    heads[..., 16:] = torch.randn(3, 6, 8, device=device)
    x, angles = heads[..., 16:], _angles(3, 8, device)
    found, expected = (f(x, *angles, is_interleaved=is_interleaved) for f in (rope, rope_ref))
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()


@ORDERS
def test_any_strides(is_interleaved, device):
    x, angles = torch.randn(8, 5, 3, device=device).permute(2, 1, 0), _angles(3, 16, device)
    angles = [table[:, ::2] for table in angles]
    found, expected = (f(x, *angles, is_interleaved=is_interleaved) for f in (rope, rope_ref))
    torch.testing.assert_close(found, expected)


def test_a_token_does_not_depend_on_the_batch(device):
    x, (cos, sin) = torch.randn(4, 3, 16, device=device), _angles(4, 16, device)
    whole = rope(x, cos, sin, is_interleaved=True)
    alone = [rope(x[i : i + 1], cos[i : i + 1], sin[i : i + 1], is_interleaved=True)[0] for i in range(4)]
    assert torch.equal(torch.stack(alone), whole)


@pytest.mark.parametrize("width", [6, 7])
def test_tables_of_another_width(width, device):
    angles = torch.zeros(2, 4, device=device)
    with pytest.raises(ValueError, match="do not fit"):
        rope(torch.zeros(2, 1, width, device=device), angles, angles, is_interleaved=True)
