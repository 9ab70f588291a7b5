"""What this worker's CPU threads can do, measured with the worker's own kernels: about a quarter of a second.

Three figures, best of several: reading as many bytes as the model has, a matrix product in its type, and what starting
an operation costs (a norm of one row, which is nothing but that). They are off where other processes use the cores or
the memory at that moment, where the clock falls under long load, and for what differs from a product or a read, such
as gathering rows; the whole machine is not measured, only the threads that this worker has.
"""

from __future__ import annotations

import time
from functools import partial

import torch
from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.linear import Linear
from headrace_kernels.rms_norm import rms_norm

from headrace_core.checkpoint.torch_scalar import TORCH_DTYPES
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.hardware_measure import best_of, cpu_hardware, read_bytes_per_s
from headrace_core.roofline.model_shape import Dtype

_SIDE = 768
_BLOCK = 128
_REPEATS = 3
_OVERHEAD_REPEATS = 100
# Less than this takes as long as starting threads; more takes too long, and tells no more.
_LEAST_BYTES = 8 << 20
_MOST_BYTES = 128 << 20


def measure_worker_cpu(weights: Dtype, compute: Dtype, model_bytes: int, *, is_int8: bool = False) -> Hardware:
    """Return the CPU as hardware named "cpu", as a model of `model_bytes` of such `weights` sees it. Any thread.

    `weights` are of the type that is computed in, or, as FP8, in 8 bits: whole numbers with `is_int8`, else FP8.
    """
    started = time.perf_counter()
    torch_dtype, num_threads = TORCH_DTYPES[compute.scalar], torch.get_num_threads()
    num_bytes = min(max(model_bytes, _LEAST_BYTES), _MOST_BYTES)
    memory = read_bytes_per_s(num_bytes, num_threads=num_threads, repeats=_REPEATS)
    with torch.inference_mode():
        rows = torch.ones(_SIDE, _SIDE, dtype=torch_dtype)
        layers = {compute: Linear(rows.clone())}
        if weights is not compute:
            layers[weights] = Linear(rows.clone(), is_int8=True) if is_int8 else _fp8_layer(torch_dtype)
        flops = {dtype: 2 * _SIDE**3 / best_of(partial(layer, rows), _REPEATS) for dtype, layer in layers.items()}
        row, weight = rows[:1, :64].contiguous(), rows[0, :64].contiguous()
        overhead_s = best_of(lambda: rms_norm(row, weight, 1e-6), _OVERHEAD_REPEATS)
    return cpu_hardware(
        flops,
        memory_bytes_per_s=memory,
        copy_bytes_per_s=memory / 2,
        operation_overhead_s=overhead_s,
        source=f"measured in {time.perf_counter() - started:.2f} s with {num_threads} threads: product of {_SIDE}, "
        f"reading {num_bytes >> 20} MiB, norm of a row",
    )


def _fp8_layer(dtype: torch.dtype) -> Linear:
    side, values = _SIDE // _BLOCK, torch.ones(_SIDE, _SIDE).to(torch.float8_e4m3fn)
    return Linear(BlockFp8(values, torch.ones(side, side), (_BLOCK, _BLOCK)), dtype=dtype)
