"""Calls of `latent_load` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import latent_load as family
from headrace_kernels.aot.case import AotCase
from headrace_kernels.latent_fp8 import row_bytes


def aot_cases() -> list[AotCase]:
    """DeepSeek's fp8 rows for a computation in bfloat16 and in float32; a latent of half a group."""

    def case(latent_dim: int, rope_dim: int, dtype: torch.dtype) -> AotCase:
        cache = torch.empty((262_144, row_bytes(latent_dim, rope_dim)), dtype=torch.uint8, device="meta")
        slots = torch.empty(8192, dtype=torch.int64, device="meta")
        name = f"latent_load {latent_dim}+{rope_dim} fp8 to {str(dtype).removeprefix('torch.')}"
        return AotCase(
            name,
            lambda: family.latent_load(cache, slots, kv_lora_rank=latent_dim, rope_dim=rope_dim, dtype=dtype),
        )

    return [case(512, 64, torch.bfloat16), case(512, 64, torch.float32), case(64, 32, torch.bfloat16)]
