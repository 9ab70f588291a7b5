"""Experts in blocks of FP8 on a GPU against plain torch's: few rows, and many, whose activations are quantised."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.experts import empty_experts
from headrace_kernels.fp8_groups import FP8, num_groups
from headrace_kernels.routing_rule import RoutedTokens

HIDDEN, WIDTH, COUNT = 136, 130, 3
BLOCKS = ((128, 128), (128, 128))


def block_fp8(rows, columns):
    values = torch.randn(rows, columns).clamp(-2, 2).to(FP8)
    return BlockFp8(values, 0.05 + 0.05 * torch.rand(num_groups(rows), num_groups(columns)), (128, 128))


@pytest.mark.parametrize(("num_tokens", "tolerance"), [(2, 3e-2), (6, 0.15)])
def test_they_compute_the_same(num_tokens, tolerance, device):
    weights = [(block_fp8(WIDTH, HIDDEN), block_fp8(WIDTH, HIDDEN), block_fp8(HIDDEN, WIDTH)) for _ in range(COUNT)]
    x = (0.3 * torch.randn(num_tokens, HIDDEN)).bfloat16()
    residual = torch.randn(num_tokens, HIDDEN).bfloat16()
    chosen = torch.stack([torch.randperm(COUNT)[:2] for _ in range(num_tokens)])
    shares = torch.rand(num_tokens, 2)
    with use_backend("reference"):
        held = empty_experts(COUNT, HIDDEN, WIDTH, x[:0], fp8_blocks=BLOCKS)
        for expert, each in enumerate(weights):
            held.put(expert, *each)
        expected = held(RoutedTokens(x, chosen, shares, None), residual)
    stacked = empty_experts(COUNT, HIDDEN, WIDTH, x[:0].to(device), fp8_blocks=BLOCKS)
    for expert, each in enumerate(weights):
        stacked.put(
            expert, *(part._replace(values=part.values.to(device), scales=part.scales.to(device)) for part in each)
        )
    routed = RoutedTokens(x.to(device), chosen.to(device), shares.to(device), None)
    found = stacked(routed, residual.to(device))
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)
    copied = empty_experts(COUNT, HIDDEN, WIDTH, x[:0].to(device), fp8_blocks=BLOCKS)
    for expert in range(COUNT):
        copied.copy(expert, stacked, expert)
    assert torch.equal(copied(routed, residual.to(device)), found)


@pytest.mark.parametrize(
    ("block", "dtype", "problem"),
    [((64, 128), torch.bfloat16, "blocks of 64 x 128"), ((128, 128), torch.float32, "activations of torch.float32")],
)
def test_what_the_kernels_do_not_take_is_refused(block, dtype, problem, device):
    with pytest.raises(ValueError, match=problem):
        empty_experts(1, HIDDEN, WIDTH, torch.empty(0, dtype=dtype, device=device), fp8_blocks=((128, 128), block))
