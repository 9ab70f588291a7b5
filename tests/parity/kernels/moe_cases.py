"""Inputs that the tests of the expert products share."""

from __future__ import annotations

import torch
from headrace_kernels.expert_blocks import DeviceBlocks
from headrace_kernels.fp8_groups import FP8, num_groups
from headrace_kernels.moe_sort import sort_blocks_ref

DTYPES = [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (FP8, 2e-2)]


def routing(num_tokens: int, top_k: int, num_experts: int, device: str):
    """Distinct experts for each token, their weights."""
    experts = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :top_k].contiguous()
    return experts.to(device), torch.rand(num_tokens, top_k).to(device)


def blocks_of(
    experts: torch.Tensor, num_experts: int, block_size: int = 16, local: range | None = None
) -> DeviceBlocks:
    local = range(num_experts) if local is None else local
    return sort_blocks_ref(experts, num_experts, block_size, first_local=local.start, num_local=len(local))


def live_rows(blocks: DeviceBlocks) -> torch.Tensor:
    return blocks.assignment < blocks.num_assignments


def weight(shape: tuple[int, ...], dtype: torch.dtype, device: str):
    """Stacked weights [E, O, I] of products near 1, and their scales if they are fp8; gate and up have their own."""
    values = torch.randn(shape, device=device) / shape[-1] ** 0.5
    if dtype != FP8:
        return values.to(dtype), None
    scale = torch.rand(shape[0], num_groups(shape[1]), num_groups(shape[2]), device=device) / 2 + 0.25
    return (values * 2).to(FP8), scale


def gate_up_weight(num_experts: int, width: int, hidden: int, dtype: torch.dtype, device: str):
    (gate, gate_scale), (up, up_scale) = (weight((num_experts, width, hidden), dtype, device) for _ in range(2))
    scale = None if gate_scale is None or up_scale is None else torch.cat((gate_scale, up_scale), dim=1)
    # Concatenated as bytes: torch cannot concatenate float8.
    joined = (
        torch.cat((gate.view(torch.uint8), up.view(torch.uint8)), dim=1)
        if dtype == FP8
        else torch.cat((gate, up), dim=1)
    )
    return joined.view(dtype), scale


def activations(num_rows: int, width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(num_rows, width, device=device).to(torch.bfloat16 if dtype == FP8 else dtype)


def nan_empty(monkeypatch) -> None:
    """Let what `torch.empty` returns hold NaN, so that reading what was not written shows."""
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        if out.dtype == FP8:
            out.view(torch.uint8).fill_(0x7F)
        return out.fill_(float("nan")) if out.dtype in (torch.float32, torch.bfloat16) else out

    monkeypatch.setattr(torch, "empty", filled)
