"""Linear layers of which each rank has a part of the inputs, and the embedding, of which each has some rows.

Letters: T tokens, N hidden, I inputs of this rank.
"""

from __future__ import annotations

from typing import Protocol

from headrace_kernels.linear import Linear
from torch import Tensor

from headrace_core.ranks.group import RankGroup


class OntoResidual(Protocol):
    """A linear layer that ends in the residual stream."""

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return `residual` [T, N] and this layer of `x` [T, I]."""
        ...


class SummedLinear:
    """`OntoResidual` of a rank that has some of the inputs, and their columns of the weight.

    The residual joins after the ranks' sum, in float32, so that it is added once and the whole is rounded once. A bias
    belongs to one rank.
    """

    def __init__(self, linear: Linear, group: RankGroup) -> None:
        self._linear = linear
        self._group = group

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """See `OntoResidual`; every rank of the group gets the same."""
        return self._group.all_sum(self._linear(x), onto=residual)


def embed(table: Tensor, first: int, token_ids: Tensor, group: RankGroup) -> Tensor:
    """Return the rows [T, N] of `token_ids` [T] int64, of which `table` holds those from token `first` on.

    The sum over ranks has one term that is not zero: no bit is lost.
    """
    if group.size == 1:
        return table.index_select(0, token_ids)
    local = token_ids - first
    is_elsewhere = (local < 0) | (local >= len(table))
    rows = table.index_select(0, local.masked_fill(is_elsewhere, 0))
    return group.all_sum(rows.masked_fill_(is_elsewhere[:, None], 0))
