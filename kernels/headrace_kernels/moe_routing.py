"""Choose each token's experts and their weights from the router's logits.

Shapes: T tokens, E experts, K experts per token, groups of E / num_groups experts.
Tiny: T * E values; bound by launch latency.

`moe_routing` is the entry and its own specification, `moe_routing_ref`.
Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; deepseek-ai/DeepSeek-V2 modeling_deepseek.py, MoEGate;
huggingface/transformers models/{deepseek_v3,deepseek_v2,mixtral}.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import select
from headrace_kernels.routing_rule import RoutingRule


def moe_routing(logits: Tensor, bias: Tensor | None, rule: RoutingRule, num_shared: int = 0) -> tuple[Tensor, Tensor]:
    """Return every token's experts and weights.

    Of experts that are equally good the lowest is chosen on a GPU; on a CPU, one of them. A token with a logit that is
    not finite, and with a bias that is not finite every token, gets experts of no meaning, each in [0, E), and for the
    K of them weights of NaN: so whatever multiplies them gives it a result that the sampler refuses, and no other token
    is touched.

    Args:
        logits: [T, E] float32.
        bias: [E] float32, added to the scores for the choice but not for the weights; None: none.
        rule: how to choose.
        num_shared: how many shared experts every token passes as well, with weight 1: E, E + 1, ..., after its K. So a
            grouped GEMM takes them in with the routed ones.

    Returns:
        experts [T, K + num_shared] int64, the K in no defined order, and their weights, float32.

    Raises:
        ValueError: the shapes or dtypes do not fit, or the rule asks for more experts than there are to choose from.
    """
    if logits.dtype != torch.float32 or (bias is not None and bias.shape != logits.shape[1:]):
        raise ValueError(f"logits {tuple(logits.shape)} {logits.dtype} must be [T, E] float32, bias [E]")
    check_rule(rule, logits.shape[1])
    if num_shared < 0:
        raise ValueError(f"num_shared is {num_shared}")
    return select("moe_routing", logits).moe_routing(logits, bias, rule, num_shared)


def check_rule(rule: RoutingRule, num_experts: int) -> None:
    """Raise ValueError unless `rule` can be applied to `num_experts` experts."""
    group_size, rest = divmod(num_experts, max(rule.num_groups, 1))
    num_candidates = min(rule.num_groups_kept, rule.num_groups) * group_size
    is_top2_short = rule.is_group_score_top2 and rule.num_groups_kept < rule.num_groups and group_size < 2
    if rest or is_top2_short or rule.num_groups_kept < 1 or not 1 <= rule.num_experts_per_token <= num_candidates:
        raise ValueError(f"{rule} cannot be applied to {num_experts} experts")


def moe_routing_ref(
    logits: Tensor, bias: Tensor | None, rule: RoutingRule, num_shared: int = 0
) -> tuple[Tensor, Tensor]:
    """Specification of `moe_routing` in plain torch."""
    scores = logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(dim=-1)
    for_choice = scores if bias is None else scores + bias
    if rule.num_groups_kept < rule.num_groups:
        for_choice = _keep_best_groups(for_choice, rule)
    experts = for_choice.topk(rule.num_experts_per_token, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    if rule.is_normalised:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    weights = weights * rule.scaling_factor
    # 0, or NaN where anything is not finite: a bias chooses and leaves no trace, and the sigmoid of infinity is 1.
    chosen_by = logits if bias is None else logits + bias
    weights = weights + (chosen_by - chosen_by).sum(dim=-1, keepdim=True)
    if num_shared == 0:
        return experts, weights
    shared = torch.arange(num_shared, device=logits.device) + logits.shape[1]
    return (
        torch.cat([experts, shared.expand(len(experts), -1)], dim=1),
        torch.cat([weights, weights.new_ones(len(weights), num_shared)], dim=1),
    )


def _keep_best_groups(for_choice: Tensor, rule: RoutingRule) -> Tensor:
    grouped = for_choice.view(len(for_choice), rule.num_groups, -1)
    best = grouped.topk(2 if rule.is_group_score_top2 else 1, dim=-1).values
    group_scores = best.sum(dim=-1)
    kept = group_scores.topk(rule.num_groups_kept, dim=-1, sorted=False).indices
    is_dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(is_dropped[..., None], float("-inf")).flatten(1)
