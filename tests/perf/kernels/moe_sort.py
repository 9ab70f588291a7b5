"""Sorting assignments into blocks; the peer is torch's stable sort, which is only half of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from headrace_kernels.expert_blocks import bounds
from headrace_kernels.moe_sort import sort_blocks
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, num_buffers

# Tokens, experts per token, experts, local ones, rows of a block.
SHAPES = (
    (1, 8, 66, 66, 16),
    (128, 8, 66, 66, 16),
    (4096, 8, 66, 66, 64),
    (4096, 8, 256, 32, 64),
    (16384, 8, 256, 256, 64),
)


def cases() -> list[BenchCase]:
    """Decode steps and prefills of DeepSeek-V2-Lite, a shard of DeepSeek-V3 and all of it."""
    return [_case(*shape) for shape in SHAPES]


def _case(tokens: int, per_token: int, num_experts: int, num_local: int, block_size: int) -> BenchCase:
    total = tokens * per_token
    max_rows, max_blocks = bounds(total, num_local, block_size)
    ours = partial(sort_blocks, num_experts=num_experts, block_size=block_size, num_local=num_local)
    return BenchCase(
        family="moe_sort",
        shape=f"T={tokens} K={per_token} local {num_local} of {num_experts}",
        calls=_calls(ours, tokens, per_token, num_experts),
        bytes_moved=8.0 * total + 4.0 * (max_rows + max_blocks + num_experts),
        peers={"torch sort alone": _calls(_sort, tokens, per_token, num_experts)},
    )


def _sort(experts: Tensor) -> object:
    return torch.sort(experts.view(-1), stable=True)


def _calls(sort: Callable[[Tensor], object], tokens: int, per_token: int, num_experts: int) -> Calls:
    def make() -> list[Callable[[], object]]:
        def experts() -> Tensor:
            return torch.rand(tokens, num_experts, device="cuda").topk(per_token, dim=1).indices

        return [partial(sort, experts()) for _ in range(num_buffers(8.0 * tokens * per_token))]

    return make
