"""New latents as compiled kernels take them: `LatentRows` of `src/latent_row.h`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, FLOAT, INT
from headrace_kernels.cpu.library import takes

FIELDS: dict[str, Any] = {
    "c_kv": ADDRESS,
    "c_kv_stride": INT,
    "k_pe": ADDRESS,
    "k_pe_stride": INT,
    "num_rows": INT,
    "latent_dim": INT,
    "rope_dim": INT,
    "norm_weight": ADDRESS,
    "cos": ADDRESS,
    "sin": ADDRESS,
    "is_interleaved": INT,
    "eps": FLOAT,
    "cache": ADDRESS,
    "cache_stride": INT,
    "slots": ADDRESS,
}


def does_take(c_kv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slot_mapping: Tensor) -> bool:
    """Return whether compiled kernels take these as they are: no fp8 rows, angles and slots one after another."""
    is_fitting = takes(c_kv.dtype) and cache.dtype == c_kv.dtype
    return is_fitting and slot_mapping.dtype == torch.int64 and all(t.is_contiguous() for t in (cos, sin, slot_mapping))


def values(
    c_kv: Tensor,
    k_pe: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    *,
    eps: float,
    is_interleaved: bool,
) -> tuple[Any, ...]:
    """Return the values of `FIELDS`."""
    return (
        c_kv.data_ptr(),
        c_kv.stride(0),
        k_pe.data_ptr(),
        k_pe.stride(0),
        len(c_kv),
        c_kv.shape[1],
        k_pe.shape[1],
        norm_weight.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        is_interleaved,
        eps,
        cache.data_ptr(),
        cache.stride(0),
        slot_mapping.data_ptr(),
    )
