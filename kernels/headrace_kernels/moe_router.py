"""What a mixture-of-experts layer does before its experts: norm, router, routing and sorting.

Shapes: T tokens, N hidden, E routed experts, K experts per token.
Bytes read: the router's weights, 4 * E * N, and the tokens. For a decode step each of the four would be a launch of a
microsecond or two, so few tokens are one launch on NVIDIA's GPUs; else there are four steps:
`rms_norm`, a linear layer, `moe_routing`, `sort_blocks`.

`route_and_sort` is the entry; the four steps, `route_and_sort_ref`, are its specification.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.dispatch import select
from headrace_kernels.moe_routing import check_rule, moe_routing
from headrace_kernels.moe_sort import check_local, sort_blocks
from headrace_kernels.rms_norm import rms_norm
from headrace_kernels.routing_rule import RoutedTokens, Router


def route_and_sort(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    router: Router,
    block_size: int | None,
    *,
    slot_mapping: Tensor | None = None,
    first_local: int = 0,
    num_local: int | None = None,
) -> RoutedTokens:
    """Normalise tokens, choose their experts, and sort the assignments into blocks; synchronises with nothing.

    Where they are one launch, calls must follow one another on a device, as on one stream: they share
    counters. The first must not be captured into a CUDA graph.

    Args:
        x: [T, N] float32 or bfloat16, rows contiguous.
        norm_weight: [N], dtype of `x`.
        eps: added to the mean square.
        router: how experts are chosen.
        block_size: rows of a block, at least 1; None: nothing is sorted, for experts that do so themselves.
        slot_mapping: [T] int64; a token with -1 is padding, as of a CUDA graph's batch: its experts are -1, with weight
            0, so no expert is read or counted for it. None: no token is.
        first_local: see `sort_blocks`; shared experts count, from E on.
        num_local: see `sort_blocks`.

    Raises:
        ValueError: the shapes, dtypes, strides, rule or local experts do not fit.
        RuntimeError: the first call on a device is captured into a CUDA graph.
    """
    num_experts = len(router.weight) + router.num_shared
    num_local = num_experts - first_local if num_local is None else num_local
    _check(x, norm_weight, router)
    if slot_mapping is not None and (slot_mapping.shape != x.shape[:1] or slot_mapping.dtype != torch.int64):
        raise ValueError(f"slot_mapping {tuple(slot_mapping.shape)} {slot_mapping.dtype} must be [T] int64")
    check_local(num_experts, 1 if block_size is None else block_size, first_local, num_local)
    return select("moe_router", x).route_and_sort(
        x, norm_weight, eps, router, block_size, slot_mapping, first_local, num_local
    )


def route_and_sort_ref(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    router: Router,
    block_size: int | None,
    slot_mapping: Tensor | None,
    first_local: int,
    num_local: int,
) -> RoutedTokens:
    """Specification of `route_and_sort`: its steps, one after another."""
    x = rms_norm(x, norm_weight, eps)
    logits = F.linear(x.float(), router.weight)
    experts, weights = moe_routing(logits, router.bias, router.rule, router.num_shared)
    if slot_mapping is not None:
        is_padding = (slot_mapping < 0)[:, None]
        experts, weights = experts.masked_fill(is_padding, -1), weights.masked_fill(is_padding, 0.0)
    if block_size is None:
        return RoutedTokens(x, experts, weights, None)
    num_experts = len(router.weight) + router.num_shared
    blocks = sort_blocks(experts, num_experts, block_size, first_local=first_local, num_local=num_local)
    return RoutedTokens(x, experts, weights, blocks)


def _check(x: Tensor, norm_weight: Tensor, router: Router) -> None:
    weight, bias = router.weight, router.bias
    if x.ndim != 2 or norm_weight.shape != x.shape[1:] or weight.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"x {tuple(x.shape)}, norm_weight {tuple(norm_weight.shape)} and router {tuple(weight.shape)} do not fit"
        )
    if x.dtype not in (torch.float32, torch.bfloat16) or norm_weight.dtype != x.dtype:
        raise ValueError(f"x {x.dtype} and norm_weight {norm_weight.dtype} must both be float32 or both bfloat16")
    if weight.dtype != torch.float32 or (
        bias is not None and (bias.shape, bias.dtype) != (weight.shape[:1], weight.dtype)
    ):
        raise ValueError(f"the router's weight {tuple(weight.shape)} {weight.dtype} must be float32, its bias [E] too")
    if not weight.is_contiguous() or (x.shape[1] > 1 and x.stride(1) != 1) or router.num_shared < 0:
        raise ValueError(f"rows must be contiguous and num_shared, {router.num_shared}, not negative")
    check_rule(router.rule, len(weight))
