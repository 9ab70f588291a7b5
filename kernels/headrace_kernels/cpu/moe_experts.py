"""All experts of a mixture-of-experts layer compiled: `src/moe_experts.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, INT, address, structure
from headrace_kernels.cpu.library import call

_MoeExperts = structure(
    "_MoeExperts",
    x=ADDRESS,
    x_stride=INT,
    num_tokens=INT,
    hidden=INT,
    experts=ADDRESS,
    weights=ADDRESS,
    num_per_token=INT,
    first_local=INT,
    num_local=INT,
    gate_up=ADDRESS,
    down=ADDRESS,
    width=INT,
    residual=ADDRESS,
    residual_stride=INT,
    y=ADDRESS,
    y_stride=INT,
)


def moe_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    width: int,
    *,
    residual: Tensor | None = None,
    first_local: int = 0,
) -> Tensor:
    """Return each token's weighted sum over its experts, [T, N]: see the family's entry.

    A token's experts are added up in their order, in float32, onto `residual`; the result is rounded once.

    Args:
        x: [T, N] float32 or bfloat16, rows contiguous.
        experts: [T, K] int64.
        weights: [T, K] float32.
        gate_up: [E, 2 * I, N], packed by `panels.pack_gate_up`.
        down: [E, N, I], packed by `panels.pack`.
        width: I.
        residual: [T, N], rows contiguous; None: zeros.
        first_local: the expert that `gate_up[0]` is.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    experts, weights = experts.contiguous(), weights.contiguous()
    arguments = _MoeExperts(
        x.data_ptr(),
        x.stride(0),
        len(x),
        x.shape[1],
        experts.data_ptr(),
        weights.data_ptr(),
        experts.shape[1],
        first_local,
        len(gate_up),
        gate_up.data_ptr(),
        down.data_ptr(),
        width,
        address(residual),
        0 if residual is None else residual.stride(0),
        y.data_ptr(),
        x.shape[1],
    )
    call("moe_experts", arguments, x.dtype)
    return y
