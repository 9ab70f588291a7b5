"""Weights as compiled kernels read them: panels of 16 outputs, each from start to end (src/panel.h).

A weight [O, I] becomes ceil(O / 16) panels: in bfloat16 [I / 2][16][2], in float32 [I][16]; zeros fill what is left.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16


def padded(count: int) -> int:
    """Return `count` outputs and those of zeros that fill their last panel."""
    return -(-count // LANES) * LANES


def packed_shape(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the shape, panels and their size, of a packed weight [O, I]."""
    pair = 2 if dtype == torch.bfloat16 else 1
    return padded(num_outputs) // LANES, -(-num_inputs // pair) * pair * LANES


def pack(weight: Tensor) -> Tensor:
    """Return `weight` [..., O, I], float32 or bfloat16, packed: [..., panels, panel size], contiguous."""
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    *more, num_outputs, num_inputs = weight.shape
    weight = F.pad(weight, (0, -num_inputs % pair, 0, -num_outputs % LANES))
    panels = weight.unflatten(-1, (-1, pair)).unflatten(-3, (-1, LANES))
    return panels.transpose(-3, -2).reshape(*more, panels.shape[-4], -1)


def unpack(packed: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """Return the weight [..., O, I] that `pack` packed."""
    pair = 2 if packed.dtype == torch.bfloat16 else 1
    panels = packed.unflatten(-1, (-1, LANES, pair)).transpose(-3, -2)
    return panels.flatten(-2).flatten(-3, -2)[..., :num_outputs, :num_inputs]
