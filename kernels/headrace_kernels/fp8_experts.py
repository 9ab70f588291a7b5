"""The experts of a layer, held in 8 bits as they were published (`block_fp8`): half of bfloat16's bytes.

Where there are kernels for it (a GPU), such weights are multiplied as they are; elsewhere the weights of an expert that
a token chose are brought to the compute type for the time of the product.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.dispatch import select
from headrace_kernels.routing_rule import RoutedTokens


class Fp8Experts(Protocol):
    """As `experts.Experts`, but for what is put."""

    def put(self, expert: int, gate: BlockFp8, up: BlockFp8, down: BlockFp8) -> None:
        """Take one expert's `gate` [I, N], `up` [I, N] and `down` [N, I]; the caller drops its own references."""
        ...

    def block_size(self, num_assignments: int) -> int | None:
        """See `experts.Experts`."""
        ...

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `experts.Experts`."""
        ...


def empty_fp8_experts(count: int, hidden: int, width: int, like: Tensor, block: tuple[int, int]) -> Fp8Experts:
    """Return memory for `count` experts on the device of `like`, whose dtype activations have; each is to be `put`.

    Raises:
        ValueError: these kernels do not take such blocks, or activations of that dtype.
    """
    experts: Fp8Experts = select("fp8_experts", like).empty(count, hidden, width, like, block)
    return experts
