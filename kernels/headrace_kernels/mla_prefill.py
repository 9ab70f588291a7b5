"""Naive (expanded) latent attention of prompt chunks.

Shapes: T query tokens, S key tokens over all sequences, H heads, D latent width, R rope width, Dn width of a head
without rope, Dv value width. Each cached row [D + R] is expanded by W_UK and W_UV into one key [Dn + R] and
one value [Dv] per head.
FLOPs: 2 * S * D * H * (Dn + Dv) to expand, then those of `causal_attention`; bound by compute. Of each key only the
part without rope is expanded on "triton": the rotated part is read from the rows by all heads.

Absorbed attention does 2 * H * (2 * D + R) a pair of tokens instead of 2 * H * (Dn + R + Dv), and expands nothing. So
for few new tokens behind a long prefix it would be cheaper, whatever H and S are: for fewer than
D * (Dn + Dv) / (2 * D - Dn - Dv) new tokens, 171 at DeepSeek's widths. That is not built.

`mla_prefill` is the entry; `mla_prefill_ref` is the specification it is tested against, and `mla_decode` computes the
same function absorbed.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.causal_attention import causal_attention_ref, check_starts
from headrace_kernels.dispatch import select
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
        ValueError: the shapes, types or starts do not fit.
    """
    _check(query, rows, w_uk, w_uv)
    check_starts(query_starts, key_starts, len(query), len(rows), scale)
    return select("mla_prefill", query).mla_prefill(query, rows, w_uk, w_uv, query_starts, key_starts, scale=scale)


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
    key, value = expand(query, rows, w_uk, w_uv)
    return causal_attention_ref(query, key, value, query_starts, key_starts, scale=scale)


def _check(query: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor) -> None:
    num_heads, nope_dim, latent_dim = w_uk.shape
    rope_dim = rows.shape[1] - latent_dim
    does_fit = query.shape[1:] == (num_heads, nope_dim + rope_dim) and w_uv.shape[::2] == w_uk.shape[::2]
    if not does_fit or rope_dim < 0:
        raise ValueError(
            f"query {tuple(query.shape)}, rows {tuple(rows.shape)}, w_uk {tuple(w_uk.shape)} and w_uv "
            f"{tuple(w_uv.shape)} do not fit [T, H, Dn + R], [S, D + R], [H, Dn, D], [H, Dv, D]"
        )
    if not query.dtype == rows.dtype == w_uk.dtype == w_uv.dtype:
        raise ValueError(f"query is {query.dtype}, rows {rows.dtype}, w_uk {w_uk.dtype}, w_uv {w_uv.dtype}")


def expand(query: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys [S, H, Dn + R] and values [S, H, Dv] that cached `rows` expand to."""
    num_heads, nope_dim, latent_dim = w_uk.shape
    latents = rows[:, :latent_dim]
    key = torch.empty((len(rows), *query.shape[1:]), dtype=rows.dtype, device=rows.device)
    key[..., :nope_dim] = linear(latents, w_uk.view(-1, latent_dim)).view(-1, num_heads, nope_dim)
    key[..., nope_dim:] = rows[:, None, latent_dim:]
    value = linear(latents, w_uv.view(-1, latent_dim)).view(len(rows), num_heads, -1)
    return key, value
