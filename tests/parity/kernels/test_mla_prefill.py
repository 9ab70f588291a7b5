"""Expanded latent attention against its specification."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.gpu.configs import use_config
from headrace_kernels.mla_prefill import mla_prefill, mla_prefill_ref

from tests.parity.kernels.attention_cases import SMALL_TILES, TOLERANCES, nan_around, starts


@pytest.fixture(autouse=True)
def small_tiles():
    with use_config("causal_attention", SMALL_TILES):
        yield


def tensors(queries, keys, heads, widths, dtype, device):
    latent_dim, nope_dim, rope_dim, value_dim = widths
    query = nan_around((sum(queries), heads, nope_dim + rope_dim), dtype, device)
    rows = nan_around((sum(keys), latent_dim + rope_dim), dtype, device)
    w_uk, w_uv = (
        (torch.randn(heads, width, latent_dim) * latent_dim**-0.5).to(device, dtype) for width in (nope_dim, value_dim)
    )
    return query, rows, w_uk, w_uv, starts(queries), starts(keys)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "widths"),
    [
        ([34], [39], 2, (512, 128, 64, 128)),
        ([4, 1, 6], [4, 33, 11], 3, (8, 7, 4, 5)),
        ([2, 0, 40], [2, 0, 40], 2, (32, 16, 16, 24)),
        ([5], [5], 2, (16, 16, 0, 16)),
        ([0], [3], 2, (16, 16, 16, 16)),
    ],
)
def test_equals_the_specification(queries, keys, heads, widths, dtype, device):
    arguments = tensors(queries, keys, heads, widths, dtype, device)
    scale = (widths[1] + widths[2]) ** -0.5
    found, expected = (f(*arguments, scale=scale) for f in (mla_prefill, mla_prefill_ref))
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_shapes_and_types_that_do_not_fit_are_refused(device):
    query, rows, w_uk, w_uv, one, two = tensors([2], [4], 2, (16, 16, 16, 16), torch.float32, device)
    with pytest.raises(ValueError, match="do not fit"):
        mla_prefill(query, rows[:, :20], w_uk, w_uv, one, two, scale=1.0)
    with pytest.raises(ValueError, match=r"w_uv torch\.bfloat16"):
        mla_prefill(query, rows, w_uk, w_uv.bfloat16(), one, two, scale=1.0)
    with pytest.raises(ValueError, match="more queries than keys"):
        mla_prefill(query, rows[:1], w_uk, w_uv, one, starts([1]), scale=1.0)
