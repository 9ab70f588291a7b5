"""Calls of `moe_router` whose launches must compile for every target."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels import moe_router as family
from headrace_kernels.aot.case import AotCase
from headrace_kernels.aot.cases.moe_routing import MODEL_RULES
from headrace_kernels.routing_rule import Router


def aot_cases() -> list[AotCase]:
    """The routers of real models."""

    def case(name: str, width: int, tokens: int, block_size: int) -> AotCase:
        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        rule, num_experts, num_shared = MODEL_RULES[name]
        bias = meta(num_experts) if rule.scoring == "sigmoid" else None
        router = Router(meta(num_experts, width), bias, rule, num_shared)
        x, norm_weight = meta(tokens, width, dtype=torch.bfloat16), meta(width, dtype=torch.bfloat16)
        slots = meta(tokens, dtype=torch.int64)
        return AotCase(
            f"moe_router {name} T={tokens}",
            lambda: family.route_and_sort(x, norm_weight, 1e-6, router, block_size, slot_mapping=slots),
        )

    return [
        case("V2-Lite", 2048, 1, 16),
        case("V2-Lite", 2048, 4, 16),
        case("V2-Lite", 2048, 64, 16),
        case("V3", 7168, 16, 16),
        case("V3", 7168, 64, 64),
        case("Kimi-K2", 7168, 32, 16),
        case("Mixtral", 4096, 32, 16),
    ]
