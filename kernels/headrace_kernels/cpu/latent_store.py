"""`headrace_kernels.latent_store` compiled: `src/latent_store.cpp`, the same code as decode rows go by."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.cpu.arguments import structure
from headrace_kernels.cpu.latent_rows import FIELDS, does_take, plain_rows, values
from headrace_kernels.cpu.library import call
from headrace_kernels.reference import latent_store as reference

_LatentRows = structure("_LatentRows", **FIELDS)


def latent_store(latents: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """See `headrace_kernels.latent_store.latent_store`: a copy, which plain torch makes."""
    reference.latent_store(latents, cache, slot_mapping)


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
