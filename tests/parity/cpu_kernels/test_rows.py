"""Kernels that work row by row: norm, rotation, gate, and rows copied to the cache."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.latent_store import latent_store
from headrace_kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from headrace_kernels.rope import rope, rope_ref
from headrace_kernels.silu_mul import silu_mul, silu_mul_ref

from tests.parity.cpu_kernels.inputs import NAN, assert_near, on_threads, plain, random

SHAPES = [(1, 1), (1, 16), (3, 15), (17, 33), (65, 130)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_normalised(shape, dtype):
    x, residual, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype), plain(shape[1], dtype=dtype)
    # Rounded before the weight, as it says.
    assert_near(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5).float())
    normalised, total = add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = add_rms_norm_ref(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_near(normalised, expected.float())
    assert torch.equal(on_threads(1, lambda: rms_norm(x, weight, 1e-5)), rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("spoilt", [NAN, float("inf"), 3e38])
def test_a_row_that_is_too_large_is_no_number(spoilt, dtype):
    x = plain(3, 40, dtype=dtype)
    x[1, 7] = spoilt
    found = rms_norm(x, torch.ones(40, dtype=dtype), 1e-5)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 6), (33, 2, 64)])
def test_heads_are_turned(shape, is_interleaved, dtype):
    x = random(shape[0], shape[1], shape[2], dtype=dtype)
    angles = torch.randn(shape[0], shape[2] // 2)
    turned = rope(x, angles.cos(), angles.sin(), is_interleaved=is_interleaved)
    assert_near(turned, rope_ref(x.float(), angles.cos(), angles.sin(), is_interleaved=is_interleaved))


@pytest.mark.parametrize("shape", SHAPES)
def test_gates_are_applied(shape, dtype):
    gate_up = random(shape[0], 2 * shape[1], dtype=dtype)
    assert_near(silu_mul(gate_up), silu_mul_ref(gate_up.float()))
    assert torch.equal(on_threads(1, lambda: silu_mul(gate_up)), silu_mul(gate_up))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_copied_to_their_slots(shape, dtype):
    rows, cache = random(*shape, dtype=dtype), torch.full((80, shape[1] + 3), NAN, dtype=dtype)[:, : shape[1]]
    slots = torch.randperm(80)[: shape[0]]
    slots[0] = -1
    if shape[0] > 2:
        rows[2, shape[1] // 2] = float("-inf")
    latent_store(rows, cache, slots)
    for row, slot in zip(rows[1:], slots[1:], strict=True):
        expected = row if row.isfinite().all() else torch.full_like(row, NAN)
        torch.testing.assert_close(cache[slot], expected, rtol=0, atol=0, equal_nan=True)
    left = torch.ones(80, dtype=torch.bool)
    left[slots[1:]] = False
    assert cache[left].isnan().all(), "nothing is stored for padding"
