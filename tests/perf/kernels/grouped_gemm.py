"""Each product with stacked experts alone, blocks sorted before, and the tiles worth trying for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from headrace_kernels.gpu.configs import Config
from headrace_kernels.gpu.grouped_gemm import key
from headrace_kernels.grouped_gemm import experts_down, experts_gate_up
from headrace_kernels.moe_experts import best_block_size
from headrace_kernels.moe_sort import sort_blocks

from tests.perf.kernels.bench_case import BenchCase, Calls, TuningCase, num_buffers
from tests.perf.kernels.tiles import fits

# Hidden, width, experts, experts per token.
LAYERS = {"V2-Lite": (2048, 1408, 64, 6), "Mixtral": (4096, 14336, 8, 2)}
TOKENS = (32, 256, 1024, 4096)


def cases() -> list[BenchCase]:
    """Both products of two layers, in bfloat16."""
    return [_case(name, tokens, is_gated) for name in LAYERS for tokens in TOKENS for is_gated in (True, False)]


def tuning() -> list[TuningCase]:
    """Tiles for each of `cases`: one number of tokens for each size of block."""
    found: dict[str, TuningCase] = {}
    for name, (hidden, width, num_experts, top_k) in LAYERS.items():
        for tokens in TOKENS:
            block_size = best_block_size(tokens * top_k, num_experts)
            for is_gated in (True, False):
                shape = (num_experts, 2 * width, hidden) if is_gated else (num_experts, hidden, width)
                weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
                name_of_tile = key(weight, block_size, is_gated)
                changes = _changes(block_size, is_gated)
                found[name_of_tile] = ("grouped_gemm", name_of_tile, changes, _case(name, tokens, is_gated))
    return list(found.values())


def _changes(block_size: int, is_gated: bool) -> list[Config]:
    return [
        {"BLOCK_N": block_n, "BLOCK_K": block_k, "SWAP_AB": swap, "num_stages": stages, "num_warps": warps}
        for block_n in (64, 128, 256)
        for block_k in (64, 128)
        for swap in ((0, 1) if block_size < 64 else (0,))
        for stages in (3, 4)
        for warps in (4, 8)
        if fits(
            warps,
            shared_bytes=2 * stages * block_k * (block_size + block_n * (1 + is_gated)),
            values=block_size * block_n * (1 + is_gated),
        )
    ]


def _case(name: str, tokens: int, is_gated: bool) -> BenchCase:
    hidden, width, num_experts, top_k = LAYERS[name]
    halves = 2 if is_gated else 1
    num_hit = len(_experts(tokens, num_experts, top_k).unique())
    rows = tokens * top_k
    moved = tokens * hidden + rows * width if is_gated else rows * (width + hidden)
    return BenchCase(
        family="grouped_gemm",
        shape=f"{'gate_up' if is_gated else 'down'} {name} T={tokens}, {num_hit} of {num_experts} experts hit",
        calls=_calls(name, tokens, is_gated),
        bytes_moved=2.0 * (num_hit * halves * hidden * width + moved),
        flops=2.0 * halves * rows * hidden * width,
    )


def _experts(tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, num_experts, generator=generator).topk(top_k, dim=1).indices


def _calls(name: str, tokens: int, is_gated: bool) -> Calls:
    hidden, width, num_experts, top_k = LAYERS[name]

    def one() -> Callable[[], object]:
        experts = _experts(tokens, num_experts, top_k).cuda()
        blocks = sort_blocks(experts, num_experts, best_block_size(experts.numel(), num_experts))
        num_rows, inputs, outputs = (tokens, hidden, 2 * width) if is_gated else (len(blocks.assignment), width, hidden)
        x = torch.randn(num_rows, inputs, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(num_experts, outputs, inputs, device="cuda", dtype=torch.bfloat16) / 32
        return partial(experts_gate_up if is_gated else experts_down, x, weight, blocks)

    def make() -> list[Callable[[], object]]:
        return [one() for _ in range(num_buffers(2.0 * num_experts * hidden * width))]

    return make
