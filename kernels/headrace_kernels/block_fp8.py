"""Weights as float8_e4m3fn with a float32 scale for each block of rows and columns, as DeepSeek-V3 is published.

Source: deepseek-ai/DeepSeek-V3 README_WEIGHTS.md, "Dequantization Method".
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor


class BlockFp8(NamedTuple):
    """A weight [O, I]: `values` float8_e4m3fn, `scales` [ceil(O / rows), ceil(I / columns)] float32, `block`: both."""

    values: Tensor
    scales: Tensor
    block: tuple[int, int]

    def to(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [O, I] as `dtype`; products are rounded once, from float32."""
        rows, columns = self.block
        out = torch.empty(self.values.shape, dtype=dtype)
        # One row of blocks at a time, so that no float32 copy of the whole weight exists.
        for index, first in enumerate(range(0, len(self.values), rows)):
            per_column = self.scales[index].repeat_interleave(columns)[: self.values.shape[1]]
            out[first : first + rows] = self.values[first : first + rows].float() * per_column
        return out

    def split(self, width: int, axis: int) -> list[Self]:
        """Return pieces of `width` along side `axis`: copies, each with its own scales.

        Raises:
            ValueError: a piece would begin within a block.
        """
        if self.values.shape[axis] > width and width % self.block[axis]:
            raise ValueError(f"pieces of {width} begin within blocks of {self.block[axis]}")
        values = self.values.view(torch.uint8).split(width, axis)
        scales = self.scales.split(-(-width // self.block[axis]), axis)
        return [
            self._replace(values=piece.contiguous().view(self.values.dtype), scales=its.contiguous())
            for piece, its in zip(values, scales, strict=True)
        ]
