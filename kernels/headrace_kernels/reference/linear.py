"""`headrace_kernels.linear` in plain torch: oneDNN's on a CPU.

bfloat16 weights are held in oneDNN's blocked order, which saves reordering them at every call. oneDNN compiles a
program for each new shape: measured, 1.6 ms and 0.6 MiB each. So the number of rows is padded to one of few.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.rms_norm import rms_norm

_PACKED_FOR_ROWS = 64
_EXACT_ROWS = 8
_STEPS_PER_OCTAVE = 4


def pack(weight: Tensor) -> Tensor | None:
    """See `headrace_kernels.linear.Linear`; packed where oneDNN multiplies bfloat16 here."""
    if not _is_onednn(weight):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    """See `headrace_kernels.linear.Linear.__call__`."""
    num_rows = len(x)
    padded = pad_rows(x)
    out = torch.ops.mkldnn._linear_pointwise(padded, packed, bias, "none", [], "")
    return out if len(out) == num_rows else out[:num_rows]


def packed_norm_linear(
    x: Tensor, norm_weight: Tensor | None, packed: Tensor, eps: float, bias: Tensor | None, num_outputs: int
) -> Tensor:
    """See `headrace_kernels.linear.Linear.after_norm`."""
    norm_weight = x.new_ones(x.shape[1]) if norm_weight is None else norm_weight
    return packed_linear(rms_norm(x, norm_weight, eps), packed, bias, num_outputs)


def packed_linear_add(x: Tensor, packed: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.linear.Linear.added_to`."""
    return packed_linear(x, packed, bias, residual.shape[1]).add_(residual)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.linear.linear`."""
    if not _is_onednn(weight):
        return F.linear(x, weight, bias)
    return F.linear(pad_rows(x), weight, bias)[: len(x)]


def pad_rows(x: Tensor) -> Tensor:
    """Return `x` [T, I] with rows of zeros up to `padded_count(T)`."""
    missing = padded_count(len(x)) - len(x)
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def padded_count(count: int) -> int:
    """Return the least number not below `count` that is at most 8 or one of 4 steps between powers of two."""
    if count <= _EXACT_ROWS:
        return count
    step = (1 << ((count - 1).bit_length() - 1)) // _STEPS_PER_OCTAVE
    return -(-count // step) * step


def _is_onednn(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
