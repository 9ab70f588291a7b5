"""`headrace_kernels.mla_prefill` compiled: `src/mla_prefill.cpp`; keys and values in float32, a tile at a time."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, FLOAT, INT, structure
from headrace_kernels.cpu.library import call, takes
from headrace_kernels.reference import mla_prefill as reference

_MlaPrefill = structure(
    "_MlaPrefill",
    query=ADDRESS,
    query_row_stride=INT,
    query_head_stride=INT,
    num_heads=INT,
    rows=ADDRESS,
    row_stride=INT,
    latent_dim=INT,
    rope_dim=INT,
    w_uk=ADDRESS,
    w_uv=ADDRESS,
    nope_dim=INT,
    value_dim=INT,
    num_sequences=INT,
    query_starts=ADDRESS,
    key_starts=ADDRESS,
    scale=FLOAT,
    out=ADDRESS,
)


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
    """See `headrace_kernels.mla_prefill.mla_prefill`."""
    are_plain = w_uk.is_contiguous() and w_uv.is_contiguous() and query.stride(2) == rows.stride(1) == 1
    if not are_plain or not takes(query.dtype):
        return reference.mla_prefill(query, rows, w_uk, w_uv, query_starts, key_starts, scale=scale)
    num_heads, nope_dim, latent_dim = w_uk.shape
    out = query.new_empty(len(query), num_heads, w_uv.shape[1])
    arguments = _MlaPrefill(
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        num_heads,
        rows.data_ptr(),
        rows.stride(0),
        latent_dim,
        rows.shape[1] - latent_dim,
        w_uk.data_ptr(),
        w_uv.data_ptr(),
        nope_dim,
        w_uv.shape[1],
        len(query_starts) - 1,
        query_starts.data_ptr(),
        key_starts.data_ptr(),
        scale,
        out.data_ptr(),
    )
    call("mla_prefill", arguments, query.dtype)
    return out
