"""All that lies between a decode step's input projection and its latent attention.

Shapes: B decode rows, H heads, Dn width of a head without rope, R rope width, D latent width. The query is absorbed,
its first Dn columns times W_UK, and rotated, its last R; the token's own latent is normalised, its key rotated, and
both are stored in the cache, so that attention may follow at once.
Bytes moved: H * Dn * D * itemsize of weights, plus B * H * (Dn + D + 2 * R) * itemsize of queries; FLOPs:
2 * B * H * Dn * D. So the kernel is bound by memory bandwidth, and for 16 heads by its launch.

`mla_prologue` is the entry; `mla_prologue_ref` is the specification it is tested against.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2: W_UK is absorbed into the query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import select
from headrace_kernels.latent_store import check_new_latents, latent_norm_rope_store_ref
from headrace_kernels.rope import rope_ref


def mla_prologue(
    query: Tensor,
    w_uk: Tensor,
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
) -> Tensor:
    """Return the absorbed queries, and store the rows' latents; a row's result does not depend on the others.

    Args:
        query: [B, H, Dn + R], any float dtype; any strides but 1 in the last axis; not rotated yet.
        w_uk: [H, Dn, D], dtype of `query`; last axis contiguous.
        c_kv: [B, D], dtype of `query`; this and the rest as `latent_norm_rope_store` takes them.
        k_pe: [B, R].
        norm_weight: [D].
        cos: [B, R/2] float32, gathered for the rows' positions; turns the queries and `k_pe`.
        sin: [B, R/2] float32.
        cache: [S, D + R], dtype of `query`, or fp8 rows, [S, row_bytes(D, R)] uint8; written in place.
        slot_mapping: [B] int64. Of a row whose slot is -1, padding, nothing is stored, and its query means nothing.
        eps: added to the mean square.
        is_interleaved: how pairs lie in `query` and `k_pe` (`rope`).

    Returns:
        [B, H, D + R], dtype of `query`, contiguous: `mla_decode` takes it.

    Raises:
        ValueError: a shape, dtype or stride does not fit.
    """
    check_new_latents(c_kv, k_pe, norm_weight, cos, sin, cache, slot_mapping)
    _check_query(query, w_uk, c_kv, k_pe)
    row = (c_kv, k_pe, norm_weight, cos, sin, cache, slot_mapping)
    return select("mla_prologue", query).mla_prologue(query, w_uk, *row, eps=eps, is_interleaved=is_interleaved)


def mla_prologue_ref(
    query: Tensor,
    w_uk: Tensor,
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
) -> Tensor:
    """Specification of `mla_prologue`: the specifications of its parts, and the product in float32."""
    row = (c_kv, k_pe, norm_weight, cos, sin, cache, slot_mapping)
    latent_norm_rope_store_ref(*row, eps=eps, is_interleaved=is_interleaved)
    nope, pe = query.split([w_uk.shape[1], k_pe.shape[1]], dim=2)
    absorbed = torch.einsum("bhn,hnd->bhd", nope.float(), w_uk.float()).to(query.dtype)
    return torch.cat((absorbed, rope_ref(pe, cos, sin, is_interleaved=is_interleaved)), dim=2)


def _check_query(query: Tensor, w_uk: Tensor, c_kv: Tensor, k_pe: Tensor) -> None:
    (num_rows, latent_dim), rope_dim = c_kv.shape, k_pe.shape[1]
    num_heads, nope_dim = w_uk.shape[:2]
    if w_uk.shape[2] != latent_dim or query.shape != (num_rows, num_heads, nope_dim + rope_dim):
        raise ValueError(
            f"query {tuple(query.shape)} and w_uk {tuple(w_uk.shape)} do not fit [B, H, Dn + R] and [H, Dn, D] "
            f"for {num_rows} rows of {latent_dim} + {rope_dim}"
        )
    if not query.dtype == w_uk.dtype == c_kv.dtype:
        raise ValueError(f"query is {query.dtype}, w_uk {w_uk.dtype} and c_kv {c_kv.dtype}")
    if query.stride(2) != 1 or w_uk.stride(2) != 1:
        raise ValueError("the last axes of query and w_uk must be contiguous")
