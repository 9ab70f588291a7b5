"""Convert to fp8 inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
# Adding and subtracting it rounds a small number to a multiple of 2^-9, the step of fp8's subnormal numbers.
_ROUND_SUBNORMAL = tl.constexpr(1.5 * 2.0**23 * 2.0**-9)


@triton.jit
def to_fp8(x, IS_INTERPRETED: tl.constexpr) -> tl.tensor:
    """Return `x`, float32 of at most 448 in magnitude, as the nearest float8_e4m3fn; ties to even.

    The interpreter's own conversion forgets the carry into the exponent (it makes 7.98 a 4), so there `x` is rounded to
    a number of fp8 first.
    """
    if IS_INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        subnormal = (x + _ROUND_SUBNORMAL) - _ROUND_SUBNORMAL
        x = tl.where(tl.abs(x) < _SMALLEST_NORMAL, subnormal, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def quantise(
    x, SMALLEST_MAXIMUM: tl.constexpr, FP8_MAX: tl.constexpr, IS_INTERPRETED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return `x` [R, 128] float32 as fp8, and scales [R]: `headrace_kernels.act_quant` for one group a row.

    The scale of a group that is not finite throughout is NaN; what its values are converted to is the target's affair.
    """
    magnitudes = tl.abs(x)
    is_finite = tl.min((magnitudes < float("inf")).to(tl.int32), axis=1) > 0
    largest = tl.where(is_finite, tl.maximum(tl.max(magnitudes, axis=1), SMALLEST_MAXIMUM), float("nan"))
    values = to_fp8(x * tl.div_rn(FP8_MAX, largest)[:, None], IS_INTERPRETED)
    return values, tl.div_rn(largest, FP8_MAX)
