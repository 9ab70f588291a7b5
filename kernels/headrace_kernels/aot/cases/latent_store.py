"""Calls of `latent_store` whose launches must compile for every target."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels import latent_store as family
from headrace_kernels.aot.case import AotCase
from headrace_kernels.latent_fp8 import row_bytes


def aot_cases() -> list[AotCase]:
    """The latents of DeepSeek, ready and new, for a cache in bfloat16 and in fp8; the keys of Mixtral."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def ready(width: int) -> AotCase:
        slots = meta(64, dtype=torch.int64)
        run = lambda: family.latent_store(meta(64, width), meta(4096, width), slots)  # noqa: E731
        return AotCase(f"latent_store {width} bf16", run)

    def new(cache: Tensor, name: str, *, is_interleaved: bool) -> AotCase:
        c_kv, k_pe = meta(64, 3072 + 576)[:, 3072:].split([512, 64], dim=1)
        angles, slots = meta(64, 32, dtype=torch.float32), meta(64, dtype=torch.int64)
        return AotCase(
            f"latent_norm_rope_store 512+64 {name}",
            lambda: family.latent_norm_rope_store(
                c_kv, k_pe, meta(512), angles, angles, cache, slots, eps=1e-6, is_interleaved=is_interleaved
            ),
        )

    fp8 = meta(4096, row_bytes(512, 64), dtype=torch.uint8)
    return [
        ready(576),
        ready(1024),
        new(meta(4096, 576), "bf16", is_interleaved=True),
        new(meta(4096, 576), "bf16 by halves", is_interleaved=False),
        new(fp8, "fp8", is_interleaved=True),
    ]
