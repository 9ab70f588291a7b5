"""Write rows of new tokens into a paged cache: rows that are ready, or latents still to be normalised and rotated.

Shapes: T new tokens, S slots in the cache (pages x page_size), D row width. MLA stores rows of kv_lora_rank + rope_dim;
GQA stores keys and values with the same function, one call each.
A slot is `page_id * page_size + offset`; slot -1 means "skip this token" (`latent_store`: any below 0).
A row that is not finite throughout is stored as NaN throughout: an infinite key may have a score of -inf, which is a
weight of 0, and nobody would know.
Bytes moved: 2 * T * D * itemsize, so the kernels are bound by memory bandwidth, and for few tokens by their launch.

`latent_store` and `latent_norm_rope_store` are the entries; `latent_store_ref` and `latent_norm_rope_store_ref` are the
specifications they are tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import select
from headrace_kernels.latent_fp8 import pack_latents, row_bytes
from headrace_kernels.rms_norm import rms_norm_ref
from headrace_kernels.rope import rope_ref


def latent_store(latents: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Copy `latents[t]` to `cache[slot_mapping[t]]` for every t whose slot is not negative; NaN if it is not finite.

    Args:
        latents: [T, D], any float dtype, or uint8, whose rows are copied as they are; rows contiguous.
        cache: [S, D], dtype of `latents`; rows contiguous; written in place.
        slot_mapping: [T] int64; each value below S; those that are not negative are distinct.

    Raises:
        ValueError: a shape, dtype or stride does not fit.
    """
    num_tokens, dim = latents.shape
    if cache.shape[1:] != (dim,) or slot_mapping.shape != (num_tokens,):
        raise ValueError(
            f"latents {tuple(latents.shape)}, cache {tuple(cache.shape)} and slot_mapping "
            f"{tuple(slot_mapping.shape)} do not fit [T, D], [S, D], [T]"
        )
    if latents.dtype != cache.dtype:
        raise ValueError(f"latents is {latents.dtype} but cache is {cache.dtype}")
    if latents.stride(1) != 1 or cache.stride(1) != 1:
        raise ValueError("rows of latents and cache must be contiguous")
    select("latent_store", latents).latent_store(latents, cache, slot_mapping)


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
    """Normalise `c_kv[t]`, rotate `k_pe[t]` and store both as row `slot_mapping[t]` for every t whose slot is not -1.

    Each of the two is NaN throughout if its row is not finite.

    Args:
        c_kv: [T, D], any float dtype; rows contiguous, perhaps columns of a wider tensor.
        k_pe: [T, R], dtype of `c_kv`; likewise.
        norm_weight: [D], dtype of `c_kv`; contiguous.
        cos: [T, R/2] float32, gathered for the tokens' positions.
        sin: [T, R/2] float32.
        cache: [S, D + R], dtype of `c_kv`, or fp8 rows, [S, row_bytes(D, R)] uint8 (`latent_fp8`); rows contiguous;
            written in place.
        slot_mapping: [T] int64; each value in [-1, S); values other than -1 are distinct.
        eps: added to the mean square.
        is_interleaved: how pairs lie in `k_pe` (`rope`).

    Raises:
        ValueError: a shape, dtype or stride does not fit.
    """
    check_new_latents(c_kv, k_pe, norm_weight, cos, sin, cache, slot_mapping)
    select("latent_store", c_kv).latent_norm_rope_store(
        c_kv, k_pe, norm_weight, cos, sin, cache, slot_mapping, eps=eps, is_interleaved=is_interleaved
    )


def check_new_latents(
    c_kv: Tensor, k_pe: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slot_mapping: Tensor
) -> None:
    """Raise ValueError unless the arguments fit what `latent_norm_rope_store` says of them."""
    num_tokens, latent_dim = c_kv.shape
    rope_dim = k_pe.shape[1]
    tables = (num_tokens, rope_dim // 2)
    if (
        k_pe.shape[0] != num_tokens
        or norm_weight.shape != (latent_dim,)
        or rope_dim % 2
        or not cos.shape == sin.shape == tables
        or slot_mapping.shape != (num_tokens,)
    ):
        raise ValueError(
            f"c_kv {tuple(c_kv.shape)}, k_pe {tuple(k_pe.shape)}, norm_weight {tuple(norm_weight.shape)}, "
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)} and slot_mapping {tuple(slot_mapping.shape)} "
            "do not fit [T, D], [T, R], [D], [T, R/2], [T, R/2], [T]"
        )
    if not c_kv.dtype == k_pe.dtype == norm_weight.dtype:
        raise ValueError(f"c_kv is {c_kv.dtype}, k_pe {k_pe.dtype} and norm_weight {norm_weight.dtype}")
    if c_kv.stride(1) != 1 or k_pe.stride(1) != 1 or cache.stride(1) != 1:
        raise ValueError("rows of c_kv, k_pe and cache must be contiguous")
    is_fp8 = cache.dtype == torch.uint8
    width = row_bytes(latent_dim, rope_dim) if is_fp8 else latent_dim + rope_dim
    if cache.dtype not in (torch.uint8, c_kv.dtype) or cache.shape[1:] != (width,):
        raise ValueError(
            f"cache {tuple(cache.shape)} {cache.dtype} cannot hold rows of {latent_dim} + {rope_dim} {c_kv.dtype}"
        )


def latent_store_ref(latents: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Specification of `latent_store` in plain torch."""
    kept = slot_mapping >= 0
    rows = latents[kept]
    if rows.is_floating_point():
        rows = rows.masked_fill(~rows.isfinite().all(dim=1, keepdim=True), float("nan"))
    cache[slot_mapping[kept]] = rows


def latent_norm_rope_store_ref(
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
    """Specification of `latent_norm_rope_store`: the specifications of its parts, one after the other."""
    k_pe = rope_ref(k_pe[:, None], cos, sin, is_interleaved=is_interleaved)[:, 0]
    k_pe = k_pe.masked_fill(~k_pe.isfinite().all(dim=1, keepdim=True), float("nan"))
    rows = torch.cat((rms_norm_ref(c_kv, norm_weight, eps), k_pe), dim=1)
    kept = slot_mapping >= 0
    cache[slot_mapping[kept]] = as_cached(rows, cache, c_kv.shape[1])[kept]


def as_cached(rows: Tensor, cache: Tensor, latent_dim: int) -> Tensor:
    """Return `rows` [T, D + R] in the format of `cache`."""
    return pack_latents(rows, latent_dim, rows.shape[1] - latent_dim) if cache.dtype == torch.uint8 else rows
