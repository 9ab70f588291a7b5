"""`headrace_kernels.rms_norm` in Triton: one program a row, the row held in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels import rms_norm as family
from headrace_kernels.gpu.launch import AotCase, launch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `headrace_kernels.rms_norm.rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, width = x.shape
    block = triton.next_power_of_2(width)
    num_warps = min(max(block // 512, 1), 8)
    launch(_rms_norm_kernel, (num_rows,), x, x.stride(0), weight, out, width, eps, BLOCK_N=block, num_warps=num_warps)
    return out


def aot_cases() -> list[AotCase]:
    """Hidden sizes of DeepSeek-V2-Lite, Mixtral and DeepSeek-V3, and the latent norms."""

    def case(width: int) -> AotCase:
        x, weight = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((64, width), (width,)))
        return AotCase(f"rms_norm {width} bf16", lambda: family.rms_norm(x, weight, 1e-6))

    return [case(width) for width in (512, 2048, 4096, 7168)]


@triton.jit
def _rms_norm_kernel(x_ptr, x_stride, weight_ptr, out_ptr, width, eps, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    is_inside = n < width
    x = tl.load(x_ptr + row * x_stride + n, mask=is_inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + n, mask=is_inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    # Rounded before the weight is applied, as the specification does.
    normalised = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + n, (normalised * weight).to(out_ptr.dtype.element_ty), mask=is_inside)
