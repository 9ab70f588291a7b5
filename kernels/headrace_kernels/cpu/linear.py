"""`headrace_kernels.linear` compiled: `src/linear.cpp`, and `src/plain_linear.cpp` for weights that are not packed."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from headrace_kernels.cpu import panels
from headrace_kernels.cpu.arguments import ADDRESS, FLOAT, INT, address, check, structure
from headrace_kernels.cpu.library import call, takes
from headrace_kernels.cpu.panels import NO_SCALES, PanelScales
from headrace_kernels.reference import linear as reference

_Linear = structure(
    "_Linear",
    x=ADDRESS,
    x_stride=INT,
    num_rows=INT,
    num_inputs=INT,
    norm_weight=ADDRESS,
    is_normed=INT,
    eps=FLOAT,
    weight=ADDRESS,
    scales=ADDRESS,
    scale_columns=INT,
    scale_lanes=INT,
    num_outputs=INT,
    bias=ADDRESS,
    residual=ADDRESS,
    residual_stride=INT,
    y=ADDRESS,
    y_stride=INT,
)
_PlainLinear = structure(
    "_PlainLinear",
    x=ADDRESS,
    x_stride=INT,
    num_rows=INT,
    num_inputs=INT,
    weight=ADDRESS,
    weight_stride=INT,
    num_outputs=INT,
    bias=ADDRESS,
    y=ADDRESS,
)
_ENTRIES = {torch.int8: "int8_linear", torch.uint8: "fp8_linear"}
# Asked at every call, as all that is checked there; a bias fits the weight that it came with.
_packed_shape = cache(panels.packed_shape)


def pack(weight: Tensor) -> Tensor | None:
    """See `headrace_kernels.linear.Linear`; in panels (`panels`)."""
    return panels.pack(weight) if takes(weight.dtype) else None


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    """See `headrace_kernels.linear.Linear.__call__`."""
    return run(x, packed, bias, num_outputs)


def packed_norm_linear(
    x: Tensor, norm_weight: Tensor | None, packed: Tensor, eps: float, bias: Tensor | None, num_outputs: int
) -> Tensor:
    """See `headrace_kernels.linear.Linear.after_norm`; what the norm gives is not rounded."""
    return run(x, packed, bias, num_outputs, norm=(norm_weight, eps))


def packed_linear_add(x: Tensor, packed: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.linear.Linear.added_to`; rounded once."""
    return run(x, packed, bias, residual.shape[1], residual=residual)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.linear.linear`."""
    does_fit = x.dtype == weight.dtype and x.shape[1] == weight.shape[1]
    if not does_fit or not takes(weight.dtype) or weight.stride(1) != 1:
        return reference.linear(x, weight, bias)
    if bias is not None:
        check("bias", bias, (len(weight),), x.dtype)
    x = _with_rows(x)
    y = x.new_empty(len(x), len(weight))
    arguments = _PlainLinear(
        x.data_ptr(),
        x.stride(0),
        *x.shape,
        weight.data_ptr(),
        weight.stride(0),
        len(weight),
        address(bias),
        y.data_ptr(),
    )
    call("plain_linear", arguments, x.dtype)
    return y


def run(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    num_outputs: int,
    *,
    norm: tuple[Tensor | None, float] | None = None,
    residual: Tensor | None = None,
    scales: PanelScales | None = None,
) -> Tensor:
    """Return `norm(x) @ weight.T + bias + residual`, [T, O], dtype of `x`, summed in float32 and rounded once.

    With `scales` `packed` is int8 (`int8_linear`), or uint8, bytes of FP8 (`fp8_linear`).

    Raises:
        ValueError: a shape, dtype or stride does not fit.
    """
    x = _with_rows(x)
    y = x.new_empty(len(x), num_outputs)
    dtype = x.dtype if scales is None else packed.dtype
    check("weight, packed,", packed, _packed_shape(num_outputs, x.shape[1], dtype), dtype)
    if scales is not None and not scales.do_fit(len(packed), x.shape[1]):
        raise ValueError(f"scales {tuple(scales.values.shape)} do not fit {len(packed)} panels of {x.shape[1]} terms")
    if residual is not None:
        check("residual", residual, (len(x), num_outputs), x.dtype)
    if norm is not None and norm[0] is not None:
        check("norm_weight", norm[0], (x.shape[1],), x.dtype)
    norm_weight, eps = norm or (None, 0.0)
    arguments = _Linear(
        x.data_ptr(),
        x.stride(0),
        *x.shape,
        address(norm_weight),
        norm is not None,
        eps,
        packed.data_ptr(),
        *(NO_SCALES if scales is None else scales.fields()),
        num_outputs,
        address(bias),
        address(residual),
        0 if residual is None else residual.stride(0),
        y.data_ptr(),
        num_outputs,
    )
    call(_ENTRIES.get(packed.dtype, "linear"), arguments, x.dtype)
    return y


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
