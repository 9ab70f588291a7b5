"""Weights as float8_e4m3fn with a float32 scale for each block of rows and columns, as DeepSeek-V3 is published.

A part of a weight is one, too: where it begins within a block, the same scales are written for smaller blocks.
Source: deepseek-ai/DeepSeek-V3 README_WEIGHTS.md, "Dequantization Method".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Block = tuple[int, int]
"""The rows and columns that share a scale."""


class BlockFp8(NamedTuple):
    """A weight [O, I]: `values` float8_e4m3fn, `scales` [ceil(O / rows), ceil(I / columns)] float32, `block`: both."""

    values: Tensor
    scales: Tensor
    block: Block

    @property
    def shape(self) -> torch.Size:
        """[O, I]."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def to(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [O, I] as `dtype`; products are rounded once, from float32."""
        rows, columns = self.block
        out = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        # One row of blocks at a time, so that no float32 copy of the whole weight exists.
        for index, first in enumerate(range(0, len(self.values), rows)):
            per_column = self.scales[index].repeat_interleave(columns)[: self.values.shape[1]]
            out[first : first + rows] = self.values[first : first + rows].float() * per_column
        return out

    def refined(self, block: Block) -> BlockFp8:
        """Return the same weight in blocks whose sides divide those of these."""
        scales = self.scales
        for axis, (side, wanted) in enumerate(zip(self.block, block, strict=True)):
            if side % wanted:
                raise ValueError(f"blocks of {self.block[0]} x {self.block[1]} are not made of {block[0]} x {block[1]}")
            if side != wanted:
                scales = scales.repeat_interleave(side // wanted, axis)
                scales = scales.narrow(axis, 0, -(-self.shape[axis] // wanted)).contiguous()
        return BlockFp8(self.values, scales, block)

    def narrow(self, axis: int, start: int, length: int) -> BlockFp8:
        """Return `length` rows (`axis` 0) or columns (1) from `start`: a copy, in smaller blocks if it must be."""
        fitting = cut_block(self.block, axis, start)
        whole, side = self.refined(fitting), fitting[axis]
        scales = whole.scales.narrow(axis, start // side, -(-length // side))
        values = self.values.view(torch.uint8).narrow(axis, start, length).clone(memory_format=torch.contiguous_format)
        return BlockFp8(values.view(self.values.dtype), scales.clone(memory_format=torch.contiguous_format), fitting)


def cut_block(block: Block, axis: int, *starts: int) -> Block:
    """Return the largest blocks, of `block`'s divided along `axis`, of which one begins at each of `starts`."""
    side = math.gcd(block[axis], *starts)
    return (side, block[1]) if axis == 0 else (block[0], side)


def stacked(weights: Sequence[BlockFp8]) -> BlockFp8:
    """Return the weight whose rows are those of `weights`, one after another."""
    rows = math.gcd(*(weight.block[0] for weight in weights), *(weight.shape[0] for weight in weights[:-1]))
    columns = math.gcd(*(weight.block[1] for weight in weights))
    fitting = [weight.refined((rows, columns)) for weight in weights]
    values = torch.cat([weight.values.view(torch.uint8) for weight in fitting])
    return BlockFp8(
        values.view(weights[0].values.dtype), torch.cat([weight.scales for weight in fitting]), (rows, columns)
    )
