"""Choose each token's experts and their weights from the router's logits.

Shapes: T tokens, E experts, K experts per token, groups of E / num_groups experts.
Tiny: T * E values; bound by launch latency.

`moe_routing` is the entry and its own specification, `moe_routing_ref`.
Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; deepseek-ai/DeepSeek-V2 modeling_deepseek.py, MoEGate;
huggingface/transformers models/{deepseek_v3,deepseek_v2,mixtral}.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RoutingRule:
    """How experts are chosen.

    `scoring` turns logits into scores. With `num_groups` > 1 only the experts of the `num_groups_kept` best groups can
    be chosen; a group is as good as its best expert or, when `is_group_score_top2`, as the sum of its best two.
    """

    num_experts_per_token: int
    scoring: Literal["sigmoid", "softmax"]
    num_groups: int = 1
    num_groups_kept: int = 1
    is_group_score_top2: bool = False
    is_normalised: bool = False
    scaling_factor: float = 1.0


def moe_routing(logits: Tensor, bias: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor]:
    """Return every token's experts and weights.

    Args:
        logits: [T, E] float32.
        bias: [E] float32, added to the scores for the choice but not for the weights; None: none.
        rule: how to choose.

    Returns:
        experts [T, K] int64, in no defined order, and their weights [T, K] float32.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    if logits.dtype != torch.float32 or (bias is not None and bias.shape != logits.shape[1:]):
        raise ValueError(f"logits {tuple(logits.shape)} {logits.dtype} must be [T, E] float32, bias [E]")
    return moe_routing_ref(logits, bias, rule)


def moe_routing_ref(logits: Tensor, bias: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor]:
    """Specification of `moe_routing` in plain torch."""
    scores = logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(dim=-1)
    for_choice = scores if bias is None else scores + bias
    if rule.num_groups_kept < rule.num_groups:
        for_choice = _keep_best_groups(for_choice, rule)
    experts = for_choice.topk(rule.num_experts_per_token, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    if rule.is_normalised:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return experts, weights * rule.scaling_factor


def _keep_best_groups(for_choice: Tensor, rule: RoutingRule) -> Tensor:
    grouped = for_choice.view(len(for_choice), rule.num_groups, -1)
    best = grouped.topk(2 if rule.is_group_score_top2 else 1, dim=-1).values
    group_scores = best.sum(dim=-1)
    kept = group_scores.topk(rule.num_groups_kept, dim=-1, sorted=False).indices
    is_dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(is_dropped[..., None], float("-inf")).flatten(1)
