"""Routing, from logits, by the rules of real models; the peer is the specification in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from headrace_kernels.aot.cases.moe_routing import MODEL_RULES
from headrace_kernels.moe_routing import moe_routing, moe_routing_ref
from headrace_kernels.routing_rule import RoutingRule
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, num_buffers

TOKENS = (1, 32, 128, 4096)

Routing = Callable[[Tensor, Tensor | None, RoutingRule, int], object]


def cases() -> list[BenchCase]:
    """Every rule, for decode steps and a prefill. Bytes: logits read, experts (8) and weights (4) written."""
    return [_case(name, tokens) for name in ("V2-Lite", "V3", "Mixtral") for tokens in TOKENS]


def _case(name: str, tokens: int) -> BenchCase:
    rule, num_experts, num_shared = MODEL_RULES[name]
    return BenchCase(
        family="moe_routing",
        shape=f"{name} T={tokens}",
        calls=_calls(moe_routing, name, tokens),
        bytes_moved=tokens * (4.0 * num_experts + 12.0 * (rule.num_experts_per_token + num_shared)),
        peers={"torch": _calls(moe_routing_ref, name, tokens)},
    )


def _calls(routing: Routing, name: str, tokens: int) -> Calls:
    def make() -> list[Callable[[], object]]:
        rule, num_experts, num_shared = MODEL_RULES[name]
        bias = torch.rand(num_experts, device="cuda") if rule.scoring == "sigmoid" else None
        return [
            partial(routing, torch.randn(tokens, num_experts, device="cuda"), bias, rule, num_shared)
            for _ in range(num_buffers(4.0 * tokens * num_experts))
        ]

    return make
