"""Weights as compiled kernels read them: panels of 16 outputs, each from start to end (src/panel.h, src/bytes.h).

A weight [O, I] becomes ceil(O / 16) panels: in bfloat16 [I / 2][16][2], in float32 [I][16], in int8 [I / 4][16][4];
zeros fill what is left. Bytes of FP8 are uint8, [I][16].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16
_TOGETHER = {torch.bfloat16: 2, torch.int8: 4}
"""Terms of one output that lie side by side."""


class PanelScales(NamedTuple):
    """`values` [..., panels, groups, lanes] float32: for each `columns` terms one of a panel, or one of each output."""

    values: Tensor
    columns: int

    def fields(self) -> tuple[int, int, int]:
        """Return what `struct Scales` of src/panel.h is."""
        return self.values.data_ptr(), self.columns, self.values.shape[-1]

    def do_fit(self, num_panels: int, num_inputs: int) -> bool:
        """Return whether they are those of so many panels."""
        values, groups = self.values, -(-num_inputs // self.columns)
        is_shaped = values.shape[-3:-1] == (num_panels, groups) and values.shape[-1] in (1, LANES)
        return is_shaped and values.dtype == torch.float32 and values.is_contiguous()


NO_SCALES: tuple[Any, int, int] = (None, 1, 0)


def padded(count: int) -> int:
    """Return `count` outputs and those of zeros that fill their last panel."""
    return -(-count // LANES) * LANES


def packed_shape(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the shape, panels and their size, of a packed weight [O, I]."""
    together = _TOGETHER.get(dtype, 1)
    return padded(num_outputs) // LANES, -(-num_inputs // together) * together * LANES


def pack(weight: Tensor) -> Tensor:
    """Return `weight` [..., O, I], float32, bfloat16 or int8, packed: [..., panels, panel size], contiguous."""
    together = _TOGETHER.get(weight.dtype, 1)
    *more, num_outputs, num_inputs = weight.shape
    weight = F.pad(weight, (0, -num_inputs % together, 0, -num_outputs % LANES))
    panels = weight.unflatten(-1, (-1, together)).unflatten(-3, (-1, LANES))
    return panels.transpose(-3, -2).reshape(*more, panels.shape[-4], -1)


def unpack(packed: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """Return the weight [..., O, I] that `pack` packed."""
    panels = packed.unflatten(-1, (-1, LANES, _TOGETHER.get(packed.dtype, 1))).transpose(-3, -2)
    return panels.flatten(-2).flatten(-3, -2)[..., :num_outputs, :num_inputs]
