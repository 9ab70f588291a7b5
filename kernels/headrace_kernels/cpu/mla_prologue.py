"""`headrace_kernels.mla_prologue` compiled: `src/mla_prologue.cpp`."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, FLOAT, INT, structure
from headrace_kernels.cpu.library import call, takes
from headrace_kernels.reference import mla_prologue as reference

_MlaPrologue = structure(
    "_MlaPrologue",
    c_kv=ADDRESS,
    c_kv_stride=INT,
    k_pe=ADDRESS,
    k_pe_stride=INT,
    num_rows=INT,
    latent_dim=INT,
    rope_dim=INT,
    norm_weight=ADDRESS,
    cos=ADDRESS,
    sin=ADDRESS,
    is_interleaved=INT,
    eps=FLOAT,
    cache=ADDRESS,
    cache_stride=INT,
    slots=ADDRESS,
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
    if not takes(query.dtype) or cache.dtype != query.dtype or slot_mapping.stride(0) != 1:
        return reference.mla_prologue(
            query,
            w_uk,
            c_kv,
            k_pe,
            norm_weight,
            cos,
            sin,
            cache,
            slot_mapping,
            eps=eps,
            is_interleaved=is_interleaved,
        )
    num_rows, num_heads, _ = query.shape
    out = query.new_empty(num_rows, num_heads, c_kv.shape[1] + k_pe.shape[1])
    cos, sin = cos.contiguous(), sin.contiguous()
    arguments = _MlaPrologue(
        c_kv.data_ptr(),
        c_kv.stride(0),
        k_pe.data_ptr(),
        k_pe.stride(0),
        num_rows,
        c_kv.shape[1],
        k_pe.shape[1],
        norm_weight.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        is_interleaved,
        eps,
        cache.data_ptr(),
        cache.stride(0),
        slot_mapping.data_ptr(),
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
