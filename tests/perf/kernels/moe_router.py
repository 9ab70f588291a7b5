"""Norm, router, routing and sorting in one launch, beside our own four steps and torch's first three."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from headrace_kernels.aot.cases.moe_routing import MODEL_RULES
from headrace_kernels.gpu.configs import Config
from headrace_kernels.gpu.moe_router import config_key
from headrace_kernels.moe_router import route_and_sort, route_and_sort_ref
from headrace_kernels.moe_routing import moe_routing_ref
from headrace_kernels.routing_rule import Router
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, TuningCase, num_buffers

WIDTHS = {"V2-Lite": 2048, "V3": 7168, "Mixtral": 4096}
TOKENS = (1, 8, 16, 32, 64)
_BLOCK_SIZE = 16
_EPS = 1e-6

Layer = Callable[[Tensor, Tensor, Router], object]


def cases() -> list[BenchCase]:
    """Decode steps. Bytes: the router's weights, and the tokens twice; logits are float32, without matrix units."""
    return [_case(name, tokens) for name in WIDTHS for tokens in TOKENS]


def tuning() -> list[TuningCase]:
    """Stages of each model's layer: one choice for all batch sizes, made at one token.

    Never the warps: with fewer, a row's squares would be summed in an order that depends on the batch.
    """
    changes: list[Config] = [{"num_stages": num_stages} for num_stages in (1, 2, 3)]
    keys = {name: config_key(MODEL_RULES[name][1], width) for name, width in WIDTHS.items()}
    return [("moe_router", key, changes, _case(name, 1)) for name, key in keys.items()]


def _case(name: str, tokens: int) -> BenchCase:
    num_experts, width = MODEL_RULES[name][1], WIDTHS[name]
    return BenchCase(
        family="moe_router",
        shape=f"{name} T={tokens}",
        calls=_calls(_ours, name, tokens),
        bytes_moved=4.0 * num_experts * width + 4.0 * tokens * width,
        flops=2.0 * tokens * num_experts * width,
        ceiling="fp32",
        peers={"four steps": _calls(_four_steps, name, tokens), "torch unsorted": _calls(_torch, name, tokens)},
    )


def _calls(layer: Layer, name: str, tokens: int) -> Calls:
    def make() -> list[Callable[[], object]]:
        (rule, num_experts, num_shared), width = MODEL_RULES[name], WIDTHS[name]
        bias = torch.rand(num_experts, device="cuda") if rule.scoring == "sigmoid" else None
        norm_weight = torch.rand(width, dtype=torch.bfloat16, device="cuda")
        return [
            partial(
                layer,
                torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda"),
                norm_weight,
                Router(torch.randn(num_experts, width, device="cuda") / width**0.5, bias, rule, num_shared),
            )
            for _ in range(num_buffers(4.0 * num_experts * width))
        ]

    return make


def _ours(x: Tensor, norm_weight: Tensor, router: Router) -> object:
    return route_and_sort(x, norm_weight, _EPS, router, _BLOCK_SIZE)


def _four_steps(x: Tensor, norm_weight: Tensor, router: Router) -> object:
    num_experts = len(router.weight) + router.num_shared
    return route_and_sort_ref(x, norm_weight, _EPS, router, _BLOCK_SIZE, None, 0, num_experts)


def _torch(x: Tensor, norm_weight: Tensor, router: Router) -> object:
    normalised = F.rms_norm(x, norm_weight.shape, norm_weight, _EPS)
    return moe_routing_ref(F.linear(normalised.float(), router.weight), router.bias, router.rule, router.num_shared)
