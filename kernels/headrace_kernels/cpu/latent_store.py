"""`headrace_kernels.latent_store` compiled: `src/latent_store.cpp`; latents by the same code as decode rows go by."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, INT, structure
from headrace_kernels.cpu.latent_rows import FIELDS, does_take, plain_rows, values
from headrace_kernels.cpu.library import call, takes
from headrace_kernels.reference import latent_store as reference

_LatentRows = structure("_LatentRows", **FIELDS)
_CopiedRows = structure(
    "_CopiedRows", x=ADDRESS, x_stride=INT, num_rows=INT, width=INT, cache=ADDRESS, cache_stride=INT, slots=ADDRESS
)


def latent_store(latents: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """See `headrace_kernels.latent_store.latent_store`."""
    are_rows = latents.stride(1) == 1 and cache.stride(1) == 1
    is_plain = latents.dtype == cache.dtype and slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous()
    if not takes(latents.dtype) or not are_rows or not is_plain:
        reference.latent_store(latents, cache, slot_mapping)
        return
    arguments = _CopiedRows(
        latents.data_ptr(),
        latents.stride(0),
        *latents.shape,
        cache.data_ptr(),
        cache.stride(0),
        slot_mapping.data_ptr(),
    )
    call("latent_store", arguments, latents.dtype)


def latent_norm_rope_store(
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
) -> None:
    """See `headrace_kernels.latent_store.latent_norm_rope_store`."""
    row = (c_kv, k_pe, norm_weight, cos, sin, cache, slot_mapping)
    if not does_take(c_kv, cos, sin, slot_mapping):
        reference.latent_norm_rope_store(*row, eps=eps, is_interleaved=is_interleaved)
        return
    with plain_rows(c_kv, k_pe, cache, slot_mapping) as places:
        arguments = values(c_kv, k_pe, norm_weight, cos, sin, *places, eps=eps, is_interleaved=is_interleaved)
        call("latent_norm_rope_store", _LatentRows(*arguments), c_kv.dtype)
