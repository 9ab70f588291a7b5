"""`headrace_kernels.mla_prologue` in plain torch: `latent_norm_rope_store`, a product in batches, `rope`."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.latent_store import latent_norm_rope_store
from headrace_kernels.rope import rope


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
    """See `headrace_kernels.mla_prologue.mla_prologue`."""
    row = (c_kv, k_pe, norm_weight, cos, sin, cache, slot_mapping)
    latent_norm_rope_store(*row, eps=eps, is_interleaved=is_interleaved)
    nope_dim = w_uk.shape[1]
    absorbed = torch.bmm(query[..., :nope_dim].transpose(0, 1), w_uk).transpose(0, 1)
    return torch.cat((absorbed, rope(query[..., nope_dim:], cos, sin, is_interleaved=is_interleaved)), dim=-1)
