"""New latents as compiled kernels take them: `LatentRows` of `src/latent_row.h`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, FLOAT, INT
from headrace_kernels.cpu.library import takes
from headrace_kernels.latent_store import as_cached
from headrace_kernels.reference import latent_store as reference

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


def does_take(c_kv: Tensor, cos: Tensor, sin: Tensor, slot_mapping: Tensor) -> bool:
    """Return whether compiled kernels take these as they are: angles and slots one after another."""
    return (
        takes(c_kv.dtype)
        and slot_mapping.dtype == torch.int64
        and all(each.is_contiguous() for each in (cos, sin, slot_mapping))
    )


@contextmanager
def plain_rows(c_kv: Tensor, k_pe: Tensor, cache: Tensor, slot_mapping: Tensor) -> Generator[tuple[Tensor, Tensor]]:
    """Yield where to store rows of the computing type, a cache and its slots; then put them into `cache`.

    They are `cache` and `slot_mapping` themselves, unless its rows are fp8: then rows are packed from plain ones, so
    that they are those of a plain cache.
    """
    if cache.dtype == c_kv.dtype:
        yield cache, slot_mapping
        return
    rows = c_kv.new_empty(len(c_kv), c_kv.shape[1] + k_pe.shape[1])
    yield rows, torch.arange(len(rows))
    reference.latent_store(as_cached(rows, cache, c_kv.shape[1]), cache, slot_mapping)


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
