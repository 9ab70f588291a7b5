"""What the GPU at hand can do at best: bandwidth, matrix rates, the gap between two kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.perf.kernels.harness import measure_us

_BYTES = 2**31
_GEMM = 8192
_FP32_GEMM = 4096
_READ_BLOCK = 8192


@dataclass(frozen=True)
class Ceilings:
    """TB/s of a copy (read + write) and of reading alone, dense TFLOP/s, and µs from one empty kernel to the next.

    `fp32_tflops` is without matrix units, whole products in float32. `fp8_tflops` is None where torch cannot multiply
    fp8 on that GPU.
    """

    copy_tb_s: float
    read_tb_s: float
    bf16_tflops: float
    fp32_tflops: float
    fp8_tflops: float | None
    launch_gap_us: float

    def tb_s(self) -> float:
        """Return the bandwidth that floors use: the better of both, so that no kernel is flattered."""
        return max(self.copy_tb_s, self.read_tb_s)

    def tflops(self, ceiling: str) -> float:
        """Return the rate named "bf16", "fp32" or "fp8"; ValueError for another, or if it was not measured."""
        rate = {"bf16": self.bf16_tflops, "fp32": self.fp32_tflops, "fp8": self.fp8_tflops}.get(ceiling)
        if rate is None:
            raise ValueError(f"no measured rate for the ceiling {ceiling!r}: a case must name bf16, fp32 or fp8")
        return rate


H200_ASSUMED = Ceilings(
    copy_tb_s=4.3, read_tb_s=4.3, bf16_tflops=790.0, fp32_tflops=54.0, fp8_tflops=1480.0, launch_gap_us=1.2
)
"""What an H200 is taken to attain until one was measured; only floors follow from it, never a measured column."""


def measure() -> Ceilings:
    """Measure the GPU at hand; takes some seconds and 8 GiB of its memory."""
    buffers = [torch.randint(0, 100, (_BYTES // 4,), dtype=torch.int32, device="cuda") for _ in range(2)]
    copy_us = measure_us([lambda: buffers[0].copy_(buffers[1])])
    read_us = measure_us([lambda: _read(buffers[0]), lambda: _read(buffers[1])])
    flops = 2.0 * _GEMM**3
    return Ceilings(
        copy_tb_s=2 * _BYTES / copy_us / 1e6,
        read_tb_s=_BYTES / read_us / 1e6,
        bf16_tflops=flops / _gemm_us(_GEMM, torch.bfloat16) / 1e6,
        fp32_tflops=2.0 * _FP32_GEMM**3 / _fp32_gemm_us() / 1e6,
        fp8_tflops=_fp8_tflops(flops),
        launch_gap_us=measure_us([lambda: _empty_kernel[(1,)](buffers[0])] * 100),
    )


def _read(x: Tensor) -> None:
    num_programs = x.numel() // _READ_BLOCK
    sums = torch.empty(num_programs, dtype=x.dtype, device=x.device)
    _read_kernel[(num_programs,)](x, sums, BLOCK_N=_READ_BLOCK, num_warps=8)


def _gemm_us(size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, dtype=dtype, device="cuda") for _ in range(2))
    return measure_us([lambda: torch.mm(a, b)])


def _fp32_gemm_us() -> float:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return _gemm_us(_FP32_GEMM, torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _fp8_tflops(flops: float) -> float | None:
    a, b = (torch.randn(_GEMM, _GEMM, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def multiply() -> Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        multiply()
    except (RuntimeError, NotImplementedError):
        return None
    return flops / measure_us([multiply]) / 1e6


@triton.jit
def _read_kernel(x_ptr, sum_ptr, BLOCK_N: tl.constexpr):
    program = tl.program_id(0)
    n = program.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(sum_ptr + program, tl.sum(tl.load(x_ptr + n), axis=0))


@triton.jit
def _empty_kernel(x_ptr):
    pass
