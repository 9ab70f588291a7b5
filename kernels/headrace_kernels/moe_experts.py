"""All experts of a mixture-of-experts layer: sort, gate and up, down, weighted combine.

Shapes: T tokens, N hidden, K experts per token, E experts held here, I width of an expert. Bytes read for few tokens:
3 * N * I * itemsize for each distinct expert hit; FLOPs: 6 * T * K * N * I. Bound by memory bandwidth in decoding, by
matrix units when an expert has some 200 rows.

Up to `FEW_TOKENS` tokens take two launches, which go by the experts as they were chosen, without sorting: there every
expert is multiplied by single rows, and sorting would cost more than it saves. They multiply activations as they are,
while the products by blocks quantise them when the weights are fp8. More tokens take a sort and three launches, or five
when fp8 activations are quantised once for blocks of many rows. A token's result depends on the path and on the tile
sizes, not on the other tokens: blocks of a fixed size make it the same in any batch.

An expert-parallel shard holds a range of experts; the assignments of others contribute nothing, and the shards' results
add up to the layer's. Shared experts are `fold_shared` into the stack, as experts that every token passes with weight 1
(`moe_routing` names them); on a shard, where they belong to every rank, they are a second call.

`moe_experts` is the entry, `moe_experts_ref` the specification.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.dispatch import select
from headrace_kernels.expert_blocks import DeviceBlocks
from headrace_kernels.fp8_groups import FP8, num_groups
from headrace_kernels.grouped_gemm import (
    BLOCK_SIZES,
    check_residual,
    check_routing,
    check_weights,
    stacked_float,
)

FEW_TOKENS = 4


def moe_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    blocks: DeviceBlocks | None = None,
    residual: Tensor | None = None,
    first_local: int = 0,
    num_experts: int | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return each token's weighted sum of `down(silu(gate(x)) * up(x))` over its experts.

    Args:
        x: [T, N], dtype of the weights; bfloat16 for float8.
        experts: [T, K] int32 or int64; those outside the local ones, such as -1, contribute nothing.
        weights: [T, K] float32.
        gate_up: [E, 2 * I, N] float32, bfloat16 or float8_e4m3fn: gate rows, then up rows.
        down: [E, N, I], same dtype.
        blocks: the assignments of the local experts, sorted; None: sorted here if there are more than few tokens.
        residual: [T, N], dtype of `x`, added; None: nothing is.
        first_local: the expert that `gate_up[0]` is.
        num_experts: how many the tokens chose from, which a good size of blocks depends on; None: up to the last local.
        scales: for float8: of `gate_up` [E, 2 * ceil(I / 128), ceil(N / 128)] float32, gate's, then up's, and of `down`
            [E, ceil(N / 128), ceil(I / 128)].

    Returns:
        [T, N], dtype of `x`.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    gate_up_scale, down_scale = scales or (None, None)
    _check(x, experts, weights, (gate_up, gate_up_scale), (down, down_scale))
    check_residual(residual, x.dtype, (x.shape[0], x.shape[1]))
    return select("moe_experts", x).moe_experts(
        x,
        experts,
        weights,
        gate_up,
        down,
        blocks=blocks,
        residual=residual,
        first_local=first_local,
        num_experts=num_experts,
        scales=scales,
    )


def moe_experts_ref(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    residual: Tensor | None = None,
    first_local: int = 0,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Specification of `moe_experts` in plain torch; activations are not quantised."""
    gate_up_scale, down_scale = scales or (None, None)
    gate_up = stacked_float(
        gate_up.unflatten(1, (2, -1)), None if gate_up_scale is None else gate_up_scale.unflatten(1, (2, -1))
    )
    down = stacked_float(down, down_scale)
    out = torch.zeros_like(x, dtype=torch.float32) if residual is None else residual.float()
    for local, (gate_weight, up_weight) in enumerate(gate_up):
        token, k = (experts == first_local + local).nonzero(as_tuple=True)
        gate, up = (F.linear(x[token].float(), weight) for weight in (gate_weight, up_weight))
        row = F.linear((F.silu(gate) * up).to(x.dtype).float(), down[local])
        out = out.index_add(0, token, row * weights[token, k, None])
    return out.to(x.dtype)


def best_block_size(num_assignments: int, num_experts: int) -> int:
    """Return how many rows a block should have: an expert's share of the assignments, or the most there are tiles for.

    Larger blocks would multiply padding; smaller ones would read an expert's weights again for every block.
    """
    share = -(-num_assignments // max(num_experts, 1))
    return next((size for size in BLOCK_SIZES if size >= share), BLOCK_SIZES[-1])


def fold_shared(gate_up: Tensor, down: Tensor, shared_gate_up: Tensor, shared_down: Tensor) -> tuple[Tensor, Tensor]:
    """Return stacks of E + n experts: the routed, then a shared network n times as wide, cut into n experts.

    The sum over its parts is what the shared network computes, since `down` is linear. Block scales are folded by the
    same call if 128 divides I: then `I` counts groups.

    Args:
        gate_up: [E, 2 * I, N].
        down: [E, N, I].
        shared_gate_up: [2 * n * I, N]: gate rows, then up rows.
        shared_down: [N, n * I].

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    num_routed, hidden, width = down.shape
    num_shared, rest = divmod(shared_down.shape[1], width)
    is_fitting = shared_gate_up.shape == (2 * num_shared * width, gate_up.shape[2]) and len(shared_down) == hidden
    if rest or not is_fitting or gate_up.shape[:2] != (num_routed, 2 * width):
        raise ValueError(
            f"shared experts {tuple(shared_gate_up.shape)} and {tuple(shared_down.shape)} do not fit "
            f"{tuple(gate_up.shape)} and {tuple(down.shape)}"
        )
    halves = shared_gate_up.unflatten(0, (2, num_shared, width)).transpose(0, 1).flatten(1, 2)
    parts = shared_down.unflatten(1, (num_shared, width)).transpose(0, 1)
    return _joined(gate_up, halves), _joined(down, parts)


def _joined(routed: Tensor, shared: Tensor) -> Tensor:
    if routed.dtype != shared.dtype:
        raise ValueError(f"routed experts are {routed.dtype} but shared ones {shared.dtype}")
    out = routed.new_empty((len(routed) + len(shared), *routed.shape[1:]))
    out[: len(routed)].copy_(routed)
    out[len(routed) :].copy_(shared)
    return out


def _check(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
) -> None:
    check_routing(experts, weights)
    check_weights(*gate_up)
    check_weights(*down)
    num_experts, hidden, width = down[0].shape
    if gate_up[0].shape != (num_experts, 2 * width, hidden) or gate_up[0].dtype != down[0].dtype:
        raise ValueError(f"gate_up {tuple(gate_up[0].shape)} and down {tuple(down[0].shape)} do not fit each other")
    shapes = [None if scale is None else scale.shape[1] for _, scale in (gate_up, down)]
    if gate_up[1] is not None and shapes != [2 * num_groups(width), num_groups(hidden)]:
        raise ValueError(f"scales have {shapes} rows for weights of {2 * width} and {hidden}")
    dtype = torch.bfloat16 if down[0].dtype == FP8 else down[0].dtype
    if x.shape != (len(experts), hidden) or x.dtype != dtype or x.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} must be [{len(experts)}, {hidden}] {dtype}, contiguous rows")
