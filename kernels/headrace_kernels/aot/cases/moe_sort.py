"""Calls of `moe_sort` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import moe_sort as family
from headrace_kernels.aot.case import AotCase


def aot_cases() -> list[AotCase]:
    """A decode step's and a prefill's assignments: DeepSeek-V2-Lite with its shared experts, a shard of DeepSeek-V3."""

    def case(tokens: int, per_token: int, num_experts: int, block_size: int, num_local: int) -> AotCase:
        experts = torch.empty(tokens, per_token, dtype=torch.int64, device="meta")
        return AotCase(
            f"moe_sort T={tokens} K={per_token} local {num_local} of {num_experts}",
            lambda: family.sort_blocks(experts, num_experts, block_size, num_local=num_local),
        )

    return [case(32, 8, 66, 16, 66), case(4096, 8, 256, 64, 8)]
