"""`headrace_kernels.moe_experts` in plain torch: its steps, one after another."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.act_quant import act_quant
from headrace_kernels.expert_blocks import DeviceBlocks
from headrace_kernels.fp8_groups import FP8
from headrace_kernels.grouped_gemm import combine_assignments, experts_down, experts_gate_up
from headrace_kernels.moe_experts import best_block_size
from headrace_kernels.moe_sort import sort_blocks

_ROWS_WORTH_QUANTISING_ONCE = 64


def moe_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    blocks: DeviceBlocks | None,
    residual: Tensor | None,
    first_local: int,
    num_experts: int | None,
    scales: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """See `headrace_kernels.moe_experts.moe_experts`."""
    gate_up_scale, down_scale = scales or (None, None)
    local = range(first_local, first_local + len(gate_up))
    if blocks is None:
        num_experts = local.stop if num_experts is None else num_experts
        block_size = best_block_size(experts.numel(), num_experts)
        blocks = sort_blocks(experts, num_experts, block_size, first_local=first_local, num_local=len(gate_up))
    is_quantised_once = gate_up.dtype == FP8 and blocks.block_size >= _ROWS_WORTH_QUANTISING_ONCE
    tokens, tokens_scale = act_quant(x) if is_quantised_once else (x, None)
    rows = experts_gate_up(tokens, gate_up, blocks, gate_up_scale, tokens_scale)
    rows, rows_scale = act_quant(rows, blocks) if is_quantised_once else (rows, None)
    out = experts_down(rows, down, blocks, down_scale, rows_scale)
    return combine_assignments(out, experts, weights, local, residual)
