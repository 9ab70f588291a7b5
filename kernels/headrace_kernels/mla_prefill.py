"""Naive (expanded) latent attention of prompt chunks.

Shapes: T query tokens, S key tokens over all sequences, H heads, D latent width, R rope width, Dn width of a head
without rope, Dv value width. Each cached row [D + R] is expanded by W_UKV into one key [Dn + R] and one value
[Dv] per head.
FLOPs: 2 * S * D * H * (Dn + Dv) to expand, then those of `causal_attention`; bound by compute.

`mla_prefill` is the entry; `mla_prefill_ref` is the specification it is tested against, and `mla_decode` computes the
same function absorbed.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.causal_attention import causal_attention, causal_attention_ref


def mla_prefill(
    query: Tensor,
    rows: Tensor,
    kv_weight: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Return causal attention over latents expanded to keys and values.

    Args:
        query: [T, H, Dn + R]; the part without rope, then the rotated part.
        rows: [S, D + R], the sequences' cache rows in order, dtype of `query`.
        kv_weight: [H, Dn + Dv, D], dtype of `query`, contiguous; key rows, then value rows, of each head.
        query_starts: [B + 1] int32 on the host; see `causal_attention`.
        key_starts: [B + 1] int32 on the host.
        scale: multiplies the scores.

    Returns:
        [T, H, Dv], dtype of `query`.

    Raises:
        ValueError: the shapes do not fit.
    """
    key, value = _expand(query, rows, kv_weight)
    return causal_attention(query, key, value, query_starts, key_starts, scale=scale)


def mla_prefill_ref(
    query: Tensor,
    rows: Tensor,
    kv_weight: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Specification of `mla_prefill` in plain torch."""
    key, value = _expand(query, rows, kv_weight)
    return causal_attention_ref(query, key, value, query_starts, key_starts, scale=scale)


def _expand(query: Tensor, rows: Tensor, kv_weight: Tensor) -> tuple[Tensor, Tensor]:
    num_heads, expanded_dim, latent_dim = kv_weight.shape
    rope_dim = rows.shape[1] - latent_dim
    nope_dim = query.shape[2] - rope_dim
    if rope_dim <= 0 or not 0 < nope_dim < expanded_dim or query.shape[1] != num_heads:
        raise ValueError(
            f"query {tuple(query.shape)}, rows {tuple(rows.shape)} and kv_weight {tuple(kv_weight.shape)} "
            "do not fit [T, H, Dn + R], [S, D + R], [H, Dn + Dv, D]"
        )
    expanded = F.linear(rows[:, :latent_dim], kv_weight.view(-1, latent_dim))
    expanded = expanded.view(-1, num_heads, expanded_dim)
    key = torch.empty((rows.shape[0], num_heads, nope_dim + rope_dim), dtype=rows.dtype, device=rows.device)
    key[..., :nope_dim] = expanded[..., :nope_dim]
    key[..., nope_dim:] = rows[:, None, latent_dim:]
    return key, expanded[..., nope_dim:]
