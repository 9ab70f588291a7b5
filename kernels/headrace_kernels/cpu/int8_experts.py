"""`headrace_kernels.experts` over weights in 8 bits (`int8_weights`), compiled: `src/moe_experts.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu import int8_linear, panels
from headrace_kernels.cpu.experts import ScaledExperts, side_by_side
from headrace_kernels.cpu.library import takes
from headrace_kernels.cpu.panels import PanelScales
from headrace_kernels.reference import int8_experts as reference


class PackedInt8Experts(ScaledExperts):
    """See `headrace_kernels.experts.Experts`; what an expert's SiLU gives is quantised again."""

    def __init__(self, count: int, hidden: int, width: int, like: Tensor) -> None:
        outputs = 2 * panels.padded(width)
        gate_up, down = (
            like.new_empty(count, *panels.packed_shape(*shape, torch.int8), dtype=torch.int8)
            for shape in ((outputs, hidden), (hidden, width))
        )
        gate_up_scales, down_scales = (
            PanelScales(like.new_empty(count, padded // panels.LANES, 1, panels.LANES, dtype=torch.float32), inputs)
            for padded, inputs in ((outputs, hidden), (panels.padded(hidden), width))
        )
        super().__init__(width, gate_up, down, (gate_up_scales, down_scales))

    def put(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """See `headrace_kernels.experts.Experts`."""
        gates, ups, downs = map(int8_linear.pack, (gate, up, down))
        self._gate_up[expert] = side_by_side(gates.values, ups.values)
        self._down[expert] = downs.values
        gate_up_scales = side_by_side(*(each.scales.view(-1, 1, panels.LANES) for each in (gates, ups)))
        self._scales[0].values[expert] = gate_up_scales
        self._scales[1].values[expert] = downs.scales.view(-1, 1, panels.LANES)


def empty(count: int, hidden: int, width: int, like: Tensor) -> PackedInt8Experts | reference.Int8Experts:
    """See `headrace_kernels.experts.empty_experts`."""
    return (PackedInt8Experts if takes(like.dtype) else reference.Int8Experts)(count, hidden, width, like)
