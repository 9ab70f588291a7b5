"""`headrace_kernels.latent_store` in plain torch: whole rows are made, then copied to their slots."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.latent_store import as_cached
from headrace_kernels.rms_norm import rms_norm
from headrace_kernels.rope import rope


def latent_store(latents: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """See `headrace_kernels.latent_store.latent_store`."""
    _put(_finite_or_nan(latents), cache, slot_mapping)


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
    k_pe = _finite_or_nan(rope(k_pe[:, None], cos, sin, is_interleaved=is_interleaved)[:, 0])
    rows = torch.cat((rms_norm(c_kv, norm_weight, eps), k_pe), dim=1)
    _put(as_cached(rows, cache, c_kv.shape[1]), cache, slot_mapping)


def _finite_or_nan(rows: Tensor) -> Tensor:
    """Return `rows` [T, D] with each row that is not finite throughout made NaN; itself if there is none."""
    if not rows.is_floating_point():
        return rows
    # A finite number minus itself is 0; anything else is NaN.
    spoilt = (rows - rows).sum(dim=1, keepdim=True)
    return rows + spoilt if bool(spoilt.isnan().any()) else rows


def _put(rows: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    if len(rows) == 0:
        return
    if int(slot_mapping.min()) < 0:
        kept = slot_mapping >= 0
        rows, slot_mapping = rows[kept], slot_mapping[kept]
    cache.index_copy_(0, slot_mapping, rows)
