"""`headrace_kernels.mla_prologue` compiled: `src/mla_prologue.cpp`."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, INT, structure
from headrace_kernels.cpu.latent_rows import FIELDS, does_take, plain_rows, values
from headrace_kernels.cpu.library import call
from headrace_kernels.reference import mla_prologue as reference

_MlaPrologue = structure(
    "_MlaPrologue",
    **FIELDS,
    query=ADDRESS,
    query_row_stride=INT,
    query_head_stride=INT,
    num_heads=INT,
    nope_dim=INT,
    w_uk=ADDRESS,
    w_head_stride=INT,
    w_row_stride=INT,
    out=ADDRESS,
)


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
    if not does_take(c_kv, cos, sin, slot_mapping):
        return reference.mla_prologue(query, w_uk, *row, eps=eps, is_interleaved=is_interleaved)
    num_rows, num_heads, _ = query.shape
    out = query.new_empty(num_rows, num_heads, c_kv.shape[1] + k_pe.shape[1])
    with plain_rows(c_kv, k_pe, cache, slot_mapping) as places:
        arguments = _MlaPrologue(
            *values(c_kv, k_pe, norm_weight, cos, sin, *places, eps=eps, is_interleaved=is_interleaved),
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            num_heads,
            w_uk.shape[1],
            w_uk.data_ptr(),
            w_uk.stride(0),
            w_uk.stride(1),
            out.data_ptr(),
        )
        call("mla_prologue", arguments, query.dtype)
    return out
