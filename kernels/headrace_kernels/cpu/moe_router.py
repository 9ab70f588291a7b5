"""`headrace_kernels.moe_router` compiled: `src/moe_router.cpp`; the experts' kernel sorts for itself."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, FLOAT, INT, address, structure
from headrace_kernels.cpu.library import call
from headrace_kernels.routing_rule import RoutedTokens, Router

_MoeRouter = structure(
    "_MoeRouter",
    x=ADDRESS,
    x_stride=INT,
    num_tokens=INT,
    hidden=INT,
    norm_weight=ADDRESS,
    eps=FLOAT,
    weight=ADDRESS,
    bias=ADDRESS,
    num_experts=INT,
    num_per_token=INT,
    num_shared=INT,
    is_sigmoid=INT,
    num_groups=INT,
    num_groups_kept=INT,
    is_top2=INT,
    is_normalised=INT,
    scaling_factor=FLOAT,
    slots=ADDRESS,
    normalised=ADDRESS,
    experts=ADDRESS,
    weights=ADDRESS,
)


def route_and_sort(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    router: Router,
    block_size: int | None,
    slot_mapping: Tensor | None,
    first_local: int,
    num_local: int,
) -> RoutedTokens:
    """See `headrace_kernels.moe_router.route_and_sort`; there are no blocks."""
    rule, width = router.rule, router.rule.num_experts_per_token + router.num_shared
    normalised = torch.empty_like(x, memory_format=torch.contiguous_format)
    experts = torch.empty(len(x), width, dtype=torch.int64)
    weights = torch.empty(len(x), width)
    slots = None if slot_mapping is None else slot_mapping.contiguous()
    arguments = _MoeRouter(
        x.data_ptr(),
        x.stride(0),
        *x.shape,
        norm_weight.data_ptr(),
        eps,
        router.weight.data_ptr(),
        address(router.bias),
        len(router.weight),
        rule.num_experts_per_token,
        router.num_shared,
        rule.scoring == "sigmoid",
        rule.num_groups,
        rule.num_groups_kept,
        rule.is_group_score_top2,
        rule.is_normalised,
        rule.scaling_factor,
        address(slots),
        normalised.data_ptr(),
        experts.data_ptr(),
        weights.data_ptr(),
    )
    call("moe_router", arguments, x.dtype)
    return RoutedTokens(normalised, experts, weights, None)
