"""What this machine does now, as far as the floor of a step asks for it."""

from __future__ import annotations

import torch
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.hardware_measure import best_of, cpu_hardware, read_bytes_per_s
from headrace_core.roofline.model_shape import Dtype

_READ_BYTES = 1 << 29
_SQUARE = 2048


def measured_hardware(threads: int) -> Hardware:
    """Return how fast memory is read on so many threads, and large matrices are multiplied in the faster type."""
    squares = [torch.randn(_SQUARE, _SQUARE)]
    # Where the processor has no bfloat16, torch multiplies it a hundred times slower than float32.
    if has_bfloat16():
        squares.append(squares[0].bfloat16())
    flops = 2 * _SQUARE**3 / min(best_of(lambda each=each: each @ each, 2) for each in squares)
    read = read_bytes_per_s(_READ_BYTES, num_threads=threads, repeats=3)
    return cpu_hardware({Dtype.BF16: flops}, memory_bytes_per_s=read, copy_bytes_per_s=read / 2, source="measured now")


def has_bfloat16() -> bool:
    """Return whether oneDNN, with which torch multiplies, has bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
