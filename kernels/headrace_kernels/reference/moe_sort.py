"""`headrace_kernels.moe_sort` in plain torch: its specification."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.expert_blocks import DeviceBlocks
from headrace_kernels.moe_sort import sort_blocks_ref


def sort_blocks(experts: Tensor, num_experts: int, block_size: int, first_local: int, num_local: int) -> DeviceBlocks:
    """See `headrace_kernels.moe_sort.sort_blocks`."""
    return sort_blocks_ref(experts, num_experts, block_size, first_local=first_local, num_local=num_local)
