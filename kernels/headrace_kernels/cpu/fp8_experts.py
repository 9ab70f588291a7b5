"""`headrace_kernels.experts` over weights in blocks of FP8 (`block_fp8`), compiled; `src/moe_experts.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.block_fp8 import Block, BlockFp8
from headrace_kernels.cpu import panels
from headrace_kernels.cpu.experts import ScaledExperts, side_by_side
from headrace_kernels.cpu.fp8_linear import num_lanes, panel_scales
from headrace_kernels.cpu.library import takes
from headrace_kernels.cpu.panels import PanelScales
from headrace_kernels.reference import fp8_experts as reference


class PackedFp8Experts(ScaledExperts):
    """See `headrace_kernels.experts.Experts`."""

    def __init__(self, count: int, hidden: int, width: int, like: Tensor, blocks: tuple[Block, Block]) -> None:
        self._blocks = blocks
        shapes = (2 * panels.padded(width), hidden), (hidden, width)
        gate_up, down = (
            like.new_empty(count, *panels.packed_shape(*shape, torch.uint8), dtype=torch.uint8) for shape in shapes
        )
        # Gate and up each have their own panels: what the last one of a half is filled with is no row of the other.
        lanes = num_lanes(width, blocks[0][0]), num_lanes(hidden, blocks[1][0])
        gate_up_scales, down_scales = (
            PanelScales(
                like.new_empty(
                    count, panels.padded(outputs) // panels.LANES, -(-inputs // columns), each, dtype=torch.float32
                ),
                columns,
            )
            for (outputs, inputs), (_, columns), each in zip(shapes, blocks, lanes, strict=True)
        )
        super().__init__(width, gate_up, down, (gate_up_scales, down_scales))

    def put(self, expert: int, gate: BlockFp8, up: BlockFp8, down: BlockFp8) -> None:
        """See `headrace_kernels.experts.Experts`."""
        gate, up, down = (
            w.refined(block) for w, block in zip((gate, up, down), self._blocks[:1] * 2 + self._blocks[1:], strict=True)
        )
        gates, ups, downs = (panels.pack(weight.values.view(torch.uint8)) for weight in (gate, up, down))
        self._gate_up[expert] = side_by_side(gates, ups)
        self._down[expert] = downs
        self._scales[0].values[expert] = side_by_side(panel_scales(gate).values, panel_scales(up).values)
        self._scales[1].values[expert] = panel_scales(down).values


def empty(
    count: int, hidden: int, width: int, like: Tensor, blocks: tuple[Block, Block]
) -> PackedFp8Experts | reference.HeldExperts:
    """See `headrace_kernels.experts.empty_experts`; any blocks will do."""
    if not takes(like.dtype):
        return reference.HeldExperts(count)
    return PackedFp8Experts(count, hidden, width, like, blocks)
