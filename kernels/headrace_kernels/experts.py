"""The experts of a layer: weights held as their backend computes with them, and that copy alone.

Shapes: T tokens, N hidden, K experts per token, E experts, I width of an expert. What they compute, and what bounds it,
says `moe_experts`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from headrace_kernels.block_fp8 import Block
from headrace_kernels.dispatch import select
from headrace_kernels.routing_rule import RoutedTokens


class Experts(Protocol):
    """The experts of one layer; shared ones are among them, as experts that every token passes with weight 1."""

    def put(self, expert: int, gate: Any, up: Any, down: Any) -> None:
        """Take one expert's `gate` [I, N], `up` [I, N] and `down` [N, I]; the caller drops its own references.

        They are tensors, or `BlockFp8` where experts are held so, in blocks that those of the experts divide.
        """
        ...

    def copy(self, expert: int, other: Any, its: int) -> None:
        """Take expert `its` of `other`, experts of the same class and sizes, as `expert`."""
        ...

    def block_size(self, num_assignments: int) -> int | None:
        """Return the size of blocks for `route_and_sort` to sort so many assignments into; None: it need not."""
        ...

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """Return [T, N]: `residual` [T, N], and each token's weighted sum over its experts; see `moe_experts`.

        Experts count from 0 to E - 1 as they were `put`; -1, padding or an expert of another rank, contributes nothing.
        """
        ...


def empty_experts(
    count: int,
    hidden: int,
    width: int,
    like: Tensor,
    *,
    is_int8: bool = False,
    fp8_blocks: tuple[Block, Block] | None = None,
) -> Experts:
    """Return memory for `count` experts, of the dtype and on the device of `like`; each is to be `put`.

    With `is_int8` weights are held, and multiplied, in 8 bits (`int8_weights`); with `fp8_blocks`, those of gate and up
    and those of down, in blocks of FP8 as they were published (`block_fp8`): on a CPU what an expert's weights are
    dequantised to is what is multiplied, on a GPU activations are quantised as well, of more than few tokens.

    Raises:
        ValueError: these kernels do not take such blocks, or activations of that dtype.
    """
    experts: Experts
    if fp8_blocks is not None:
        experts = select("fp8_experts", like).empty(count, hidden, width, like, fp8_blocks)
    elif is_int8:
        experts = select("int8_experts", like).empty(count, hidden, width, like)
    else:
        experts = select("experts", like).empty(count, hidden, width, like)
    return experts
