"""`headrace_kernels.moe_routing` in Triton: one warp a token, its scores in registers, K times the best of them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.gpu.launch import launch
from headrace_kernels.routing_rule import RoutingRule


def moe_routing(logits: Tensor, bias: Tensor | None, rule: RoutingRule, num_shared: int) -> tuple[Tensor, Tensor]:
    """See `headrace_kernels.moe_routing.moe_routing`."""
    logits = logits.contiguous()
    num_rows, num_experts = logits.shape
    experts, weights = empty_routing(num_rows, rule, num_shared, logits)
    constants = routing_constants(rule, num_experts, num_shared, bias)
    width = constants["GROUPS"] * constants["GROUP_COLUMNS"]
    launch(
        _routing_kernel,
        (num_rows,),
        logits,
        bias,
        experts,
        weights,
        num_experts,
        rule.scaling_factor,
        **constants,
        num_warps=min(max(width // 512, 1), 8),
    )
    return experts, weights


def empty_routing(num_rows: int, rule: RoutingRule, num_shared: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return tensors for the experts and weights of `num_rows` tokens, not filled, on the device of `like`."""
    shape = (num_rows, rule.num_experts_per_token + num_shared)
    return like.new_empty(shape, dtype=torch.int64), like.new_empty(shape, dtype=torch.float32)


def routing_constants(rule: RoutingRule, num_experts: int, num_shared: int, bias: Tensor | None) -> dict[str, Any]:
    """Return `route`'s constants. Its columns are experts: GROUPS x GROUP_COLUMNS, groups padded to powers of two.

    A rule that drops no group is one group.
    """
    is_limited = rule.num_groups_kept < rule.num_groups
    num_groups = rule.num_groups if is_limited else 1
    return {
        "PER_TOKEN": rule.num_experts_per_token,
        "SHARED": num_shared,
        "CHOICES": triton.next_power_of_2(rule.num_experts_per_token + num_shared),
        "GROUPS": triton.next_power_of_2(num_groups),
        "GROUP_COLUMNS": triton.next_power_of_2(num_experts // num_groups),
        "GROUP_SIZE": num_experts // num_groups,
        "GROUPS_KEPT": rule.num_groups_kept if is_limited else 0,
        "IS_TOP2": rule.is_group_score_top2,
        "IS_SIGMOID": rule.scoring == "sigmoid",
        "IS_NORMALISED": rule.is_normalised,
        "HAS_BIAS": bias is not None,
    }


@triton.jit
def column_experts(
    GROUPS: tl.constexpr, GROUP_COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr, num_experts
) -> tuple[tl.tensor, tl.tensor]:
    """Return the expert of each column, in ascending order, and which columns are experts: the rest is padding."""
    column = tl.arange(0, GROUPS * GROUP_COLUMNS)
    expert = column // GROUP_COLUMNS * GROUP_SIZE + column % GROUP_COLUMNS
    return expert, (column % GROUP_COLUMNS < GROUP_SIZE) & (expert < num_experts)


@triton.jit
def route(
    logits,
    bias,
    is_expert,
    scaling_factor,
    num_experts,
    ROWS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SHARED: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    IS_TOP2: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return experts int32 and weights [ROWS, CHOICES] for logits [ROWS, columns], -inf where no expert is.

    Ties go to the lowest column, so to the lowest expert, and never to padding: a row without any candidate left gets
    column 0. A row with a logit or a biased score that is not finite has NaN weights.
    """
    column = tl.arange(0, GROUPS * GROUP_COLUMNS)[None, :]
    if IS_SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = exponentials / tl.sum(exponentials, axis=1)[:, None]
    choice_scores = scores
    if HAS_BIAS:
        choice_scores += bias[None, :]
    is_finite = (tl.abs(logits) < float("inf")) & (tl.abs(choice_scores) < float("inf"))
    is_spoilt_row = tl.max((is_expert[None, :] & (is_finite == 0)).to(tl.int32), axis=1) > 0
    choice_scores = tl.where(is_expert[None, :] & is_finite, choice_scores, float("-inf"))
    if GROUPS_KEPT > 0:
        choice_scores = _keep_best_groups(choice_scores, ROWS, GROUPS, GROUP_COLUMNS, GROUPS_KEPT, IS_TOP2)
    k = tl.arange(0, CHOICES)[None, :]
    best_columns = tl.zeros([ROWS, CHOICES], tl.int32)
    for i in range(PER_TOKEN):
        best = tl.argmax(choice_scores, axis=1)[:, None]
        best_columns = tl.where(k == i, best, best_columns)
        choice_scores = tl.where(column == best, float("-inf"), choice_scores)
    experts = best_columns // GROUP_COLUMNS * GROUP_SIZE + best_columns % GROUP_COLUMNS
    experts = tl.where(k < PER_TOKEN, experts, num_experts + k - PER_TOKEN)
    # All scores at once: one by one, each would be a reduction between warps.
    weights = tl.where(k < PER_TOKEN, tl.gather(scores, best_columns, axis=1), 0.0)
    if IS_NORMALISED:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)
    weights = tl.where(is_spoilt_row[:, None], float("nan"), weights * scaling_factor)
    return experts, tl.where(k < PER_TOKEN, weights, 1.0)


@triton.jit
def _keep_best_groups(
    scores,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    IS_TOP2: tl.constexpr,
):
    grouped = tl.reshape(scores, [ROWS, GROUPS, GROUP_COLUMNS])
    group_scores = tl.max(grouped, axis=2)
    if IS_TOP2:
        is_top = tl.arange(0, GROUP_COLUMNS)[None, None, :] == tl.argmax(grouped, axis=2)[:, :, None]
        group_scores += tl.max(tl.where(is_top, float("-inf"), grouped), axis=2)
    group = tl.arange(0, GROUPS)[None, :]
    is_kept = tl.zeros([ROWS, GROUPS], tl.int32)
    for _ in range(GROUPS_KEPT):
        is_best = group == tl.argmax(group_scores, axis=1)[:, None]
        is_kept = tl.where(is_best, 1, is_kept)
        group_scores = tl.where(is_best, float("-inf"), group_scores)
    kept = tl.where(is_kept[:, :, None] > 0, grouped, float("-inf"))
    return tl.reshape(kept, [ROWS, GROUPS * GROUP_COLUMNS])


@triton.jit
def _routing_kernel(
    logits_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    num_experts,
    scaling_factor,
    PER_TOKEN: tl.constexpr,
    SHARED: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    IS_TOP2: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert, is_expert = column_experts(GROUPS, GROUP_COLUMNS, GROUP_SIZE, num_experts)
    logits = tl.load(logits_ptr + row * num_experts + expert, mask=is_expert, other=float("-inf"))
    bias = tl.zeros([GROUPS * GROUP_COLUMNS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert, mask=is_expert, other=0.0)
    experts, weights = route(
        logits[None, :],
        bias,
        is_expert,
        scaling_factor,
        num_experts,
        1,
        PER_TOKEN,
        SHARED,
        CHOICES,
        GROUPS,
        GROUP_COLUMNS,
        GROUP_SIZE,
        GROUPS_KEPT,
        IS_TOP2,
        IS_SIGMOID,
        IS_NORMALISED,
        HAS_BIAS,
    )
    k = tl.arange(0, CHOICES)[None, :]
    is_choice = k < PER_TOKEN + SHARED
    place = row * (PER_TOKEN + SHARED) + k
    tl.store(experts_ptr + place, experts.to(tl.int64), mask=is_choice)
    tl.store(weights_ptr + place, weights, mask=is_choice)
