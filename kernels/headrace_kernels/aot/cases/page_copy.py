"""Calls of `page_copy` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import page_copy as family
from headrace_kernels.aot.case import AotCase


def aot_cases() -> list[AotCase]:
    """Pages of 64 latents, in bfloat16 and fp8, there and back."""

    def case(width: int, dtype: torch.dtype) -> AotCase:
        cache = torch.empty((1024, 64, width), dtype=dtype, device="meta")
        page_ids = torch.empty(16, dtype=torch.int64, device="meta")

        def run() -> None:
            family.scatter_pages(family.gather_pages(cache, page_ids), cache, page_ids)

        return AotCase(f"page_copy 64x{width} {str(dtype).removeprefix('torch.')}", run)

    return [case(576, torch.bfloat16), case(656, torch.uint8)]
