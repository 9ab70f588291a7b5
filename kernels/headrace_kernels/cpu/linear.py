"""Linear layers compiled: `src/linear.cpp`."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, FLOAT, INT, address, structure
from headrace_kernels.cpu.library import call

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
    num_outputs=INT,
    bias=ADDRESS,
    residual=ADDRESS,
    residual_stride=INT,
    y=ADDRESS,
    y_stride=INT,
)


def linear(
    x: Tensor,
    packed: Tensor,
    num_outputs: int,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor | None, float] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return `norm(x) @ weight.T + bias + residual`, [T, O], dtype of `x`, summed in float32 and rounded once.

    Args:
        x: [T, I] float32 or bfloat16, rows contiguous.
        packed: the weight [O, I], dtype of `x`, packed (`panels`).
        num_outputs: O.
        bias: [O], dtype of `x`; None: none.
        norm: the weight [I] of a root-mean-square norm, None: ones, and what is added to the mean square; None: no norm.
        residual: [T, O], dtype of `x`, rows contiguous; None: none.
    """
    y = x.new_empty(len(x), num_outputs)
    norm_weight, eps = norm or (None, 0.0)
    arguments = _Linear(
        x.data_ptr(),
        x.stride(0),
        len(x),
        x.shape[1],
        address(norm_weight),
        norm is not None,
        eps,
        packed.data_ptr(),
        num_outputs,
        address(bias),
        address(residual),
        0 if residual is None else residual.stride(0),
        y.data_ptr(),
        num_outputs,
    )
    call("linear", arguments, x.dtype)
    return y
