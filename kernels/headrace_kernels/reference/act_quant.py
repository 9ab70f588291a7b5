"""`headrace_kernels.act_quant` in plain torch: its specification."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.act_quant import act_quant_ref
from headrace_kernels.expert_blocks import DeviceBlocks


def act_quant(x: Tensor, blocks: DeviceBlocks | None) -> tuple[Tensor, Tensor]:
    """See `headrace_kernels.act_quant.act_quant`; rows of padding are quantised, too."""
    return act_quant_ref(x)
