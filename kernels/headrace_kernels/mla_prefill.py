"""Naive (expanded) latent attention of prompt chunks.

Shapes: T query tokens, S key tokens over all sequences, H heads, D latent width, R rope width, Dn width of a head
without rope, Dv value width. Each cached row [D + R] is expanded by W_UK and W_UV into one key [Dn + R] and
one value [Dv] per head.
FLOPs: 2 * S * D * H * (Dn + Dv) to expand, then those of `causal_attention`; bound by compute.

`mla_prefill` is the entry; `mla_prefill_ref` is the specification it is tested against, and `mla_decode` computes the
same function absorbed.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.causal_attention import causal_attention, causal_attention_ref
from headrace_kernels.linear import linear


def mla_prefill(
    query: Tensor,
    rows: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Return causal attention over latents expanded to keys and values.

    Args:
        query: [T, H, Dn + R]; the part without rope, then the rotated part.
        rows: [S, D + R], the sequences' cache rows in order, dtype of `query`.
        w_uk: [H, Dn, D], dtype of `query`, contiguous; expands a latent to keys.
        w_uv: [H, Dv, D], dtype of `query`, contiguous; expands a latent to values.
        query_starts: [B + 1] int32 on the host; see `causal_attention`.
        key_starts: [B + 1] int32 on the host.
        scale: multiplies the scores.

    Returns:
        [T, H, Dv], dtype of `query`.

    Raises:
        ValueError: the shapes do not fit.
    """
    key, value = _expand(query, rows, w_uk, w_uv)
    return causal_attention(query, key, value, query_starts, key_starts, scale=scale)


def mla_prefill_ref(
    query: Tensor,
    rows: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Specification of `mla_prefill` in plain torch."""
    key, value = _expand(query, rows, w_uk, w_uv)
    return causal_attention_ref(query, key, value, query_starts, key_starts, scale=scale)


def _expand(query: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
    num_heads, nope_dim, latent_dim = w_uk.shape
    rope_dim = rows.shape[1] - latent_dim
    if query.shape[1:] != (num_heads, nope_dim + rope_dim) or w_uv.shape[::2] != w_uk.shape[::2]:
        raise ValueError(
            f"query {tuple(query.shape)}, rows {tuple(rows.shape)}, w_uk {tuple(w_uk.shape)} and w_uv "
            f"{tuple(w_uv.shape)} do not fit [T, H, Dn + R], [S, D + R], [H, Dn, D], [H, Dv, D]"
        )
    latents = rows[:, :latent_dim]
    key = torch.empty((len(rows), *query.shape[1:]), dtype=rows.dtype, device=rows.device)
    key[..., :nope_dim] = linear(latents, w_uk.view(-1, latent_dim)).view(-1, num_heads, nope_dim)
    key[..., nope_dim:] = rows[:, None, latent_dim:]
    value = linear(latents, w_uv.view(-1, latent_dim)).view(len(rows), num_heads, -1)
    return key, value
