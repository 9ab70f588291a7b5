"""How a layer chooses experts, and what it chose: what the entries of routing take and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from headrace_kernels.expert_blocks import DeviceBlocks


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


@dataclass(frozen=True, slots=True)
class Router:
    """A layer's router.

    `weight` [E, N] and `bias` [E] are float32. `num_shared` experts beyond the E are every token's, with weight 1, as
    `moe_routing` says.
    """

    weight: Tensor
    bias: Tensor | None
    rule: RoutingRule
    num_shared: int = 0


class RoutedTokens(NamedTuple):
    """`x` [T, N] normalised; `experts` int64 and `weights` float32 [T, K + num_shared]; the sorted assignments.

    `blocks` is None where whoever multiplies by the experts sorts.
    """

    x: Tensor
    experts: Tensor
    weights: Tensor
    blocks: DeviceBlocks | None
