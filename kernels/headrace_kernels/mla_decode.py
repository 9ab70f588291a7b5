"""Absorbed latent attention of single query tokens over a paged latent cache.

Shapes: B query tokens, H heads, D latent width (kv_lora_rank), R rope width, P pages, L longest context, Dv value
width. A cache row is `c_kv` [D] then `k_pe` [R]; W_UK is already folded into the query, so that keys are the rows and
values their first D columns. Query b attends to the first `context_lens[b]` tokens of its sequence. With W_UV,
[H, Dv, D], each head's average of the latents becomes its value.

Bytes read: sum(context_lens) * row bytes, (D + R) * itemsize or those of an fp8 row (`latent_fp8`); FLOPs:
2 * H * sum(context_lens) * (2 * D + R). With 16 heads in bfloat16 that is 30 FLOPs a byte, bound by memory; with 128
it is 242, bound by the matrix units of an H200. W_UV adds H * Dv * D * itemsize bytes.

`mla_decode` and `mla_decode_values` are the entries; `mla_decode_ref` and `mla_decode_values_ref` are the
specifications that they are tested against.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.decode_rows import check_paged_rows
from headrace_kernels.dispatch import select
from headrace_kernels.latent_fp8 import row_bytes, unpack_latents
from headrace_kernels.split_ranges import SplitPlan


def mla_decode(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
    slots: Tensor | None = None,
    plan: SplitPlan | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Return each query's average of the latents, weighted by softmax over its context.

    On a GPU a context is computed in splits, combined afterwards. By default a plan cuts the whole batch into equal
    ranges: the result for the same batch is always the same, bit for bit, but a row's may differ in rounding from what
    it is in another batch. With `num_splits` a row is cut into that many splits at places that its own length alone
    decides: its result is the same, bit for bit, in every batch.

    Args:
        query: [B, H, D + R], its last dimension contiguous; dtype of `cache`, or any float dtype beside fp8 rows.
        cache: [P, page_size, D + R], contiguous, or fp8 rows, [P, page_size, row bytes] uint8 (`latent_fp8`); slots
            past a context may hold anything. On a GPU page_size is a multiple of 16.
        block_table: [B, max_pages] int32; entries past a context are not read.
        context_lens: [B] int32, each at least 1; on a GPU it may be 0, which gives zeros.
        kv_lora_rank: D.
        scale: multiplies the scores.
        slots: [B, L] int64, `paged_slots` of the three arguments before, if the caller has planned it already; not
            used on a GPU.
        plan: of `plan_mla_decode` for `context_lens`, if the caller has made it already; used on a GPU only.
        num_splits: see above; used on a GPU only.

    Returns:
        [B, H, D], dtype of `query`; scores and softmax in float32.

    Raises:
        ValueError: a shape or dtype does not fit, or there are both `plan` and `num_splits`.
    """
    _check(query, cache, kv_lora_rank)
    check_paged_rows(query.shape[0], cache.shape[1], block_table, context_lens, plan, num_splits)
    return select("mla_decode", query).mla_decode(
        query,
        cache,
        block_table,
        context_lens,
        kv_lora_rank=kv_lora_rank,
        scale=scale,
        slots=slots,
        plan=plan,
        num_splits=num_splits,
    )


def mla_decode_values(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    w_uv: Tensor,
    *,
    scale: float,
    slots: Tensor | None = None,
    plan: SplitPlan | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Return each query's attention values: `mla_decode`, then each head's latents times its W_UV.

    On a GPU these are two launches: splits are combined where their product with W_UV is computed.

    Args:
        query: this and all that follow but `w_uv`: as for `mla_decode`.
        cache: see `query`.
        block_table: see `query`.
        context_lens: see `query`.
        w_uv: [H, Dv, D], contiguous, dtype of `query`.
        scale: see `query`.
        slots: see `query`.
        plan: see `query`.
        num_splits: see `query`.

    Returns:
        [B, H * Dv], dtype of `query`.

    Raises:
        ValueError: as `mla_decode`; or `w_uv` does not fit.
    """
    if w_uv.ndim != 3 or w_uv.shape[0] != query.shape[1] or w_uv.dtype != query.dtype or not w_uv.is_contiguous():
        raise ValueError(
            f"w_uv {tuple(w_uv.shape)} {w_uv.dtype} is not contiguous [H, Dv, D] of the heads and dtype of "
            f"query {tuple(query.shape)} {query.dtype}"
        )
    _check(query, cache, w_uv.shape[2])
    check_paged_rows(query.shape[0], cache.shape[1], block_table, context_lens, plan, num_splits)
    return select("mla_decode_values", query).mla_decode_values(
        query, cache, block_table, context_lens, w_uv, scale=scale, slots=slots, plan=plan, num_splits=num_splits
    )


def plan_mla_decode(context_lens: Tensor, page_size: int, num_heads: int) -> SplitPlan | None:
    """Return the plan that every layer's `mla_decode` of a step may share; None where none is used, on a CPU.

    Args:
        context_lens: [B] int32, each at least 0.
        page_size: tokens a page holds.
        num_heads: H.

    Raises:
        ValueError: see `plan_splits`.
    """
    return select("mla_decode", context_lens).plan_mla_decode(context_lens, page_size, num_heads)


def mla_decode_ref(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
) -> Tensor:
    """Specification of `mla_decode` in plain torch."""
    page_size, rope_dim = cache.shape[1], query.shape[2] - kv_lora_rank
    out = query.new_empty((*query.shape[:2], kv_lora_rank))
    for b, length in enumerate(context_lens.tolist()):
        num_pages = -(-length // page_size)
        rows = cache[block_table[b, :num_pages].long()].flatten(0, 1)[:length]
        rows = unpack_latents(rows, kv_lora_rank, rope_dim) if rows.dtype == torch.uint8 else rows.float()
        weights = torch.softmax(query[b].float() @ rows.T * scale, dim=-1)
        out[b] = (weights @ rows[:, :kv_lora_rank]).to(query.dtype)
    return out


def mla_decode_values_ref(
    query: Tensor, cache: Tensor, block_table: Tensor, context_lens: Tensor, w_uv: Tensor, *, scale: float
) -> Tensor:
    """Specification of `mla_decode_values` in plain torch."""
    latents = mla_decode_ref(query, cache, block_table, context_lens, kv_lora_rank=w_uv.shape[2], scale=scale)
    return torch.einsum("bhd,hvd->bhv", latents.float(), w_uv.float()).flatten(1).to(query.dtype)


def _check(query: Tensor, cache: Tensor, kv_lora_rank: int) -> None:
    if query.ndim != 3 or cache.ndim != 3 or not 0 < kv_lora_rank <= query.shape[2] or query.stride(2) != 1:
        raise ValueError(
            f"query {tuple(query.shape)} and cache {tuple(cache.shape)} with a latent width of {kv_lora_rank} are not "
            "[B, H, D + R] with contiguous rows and [P, page_size, D + R]"
        )
    width, dtype = query.shape[2], query.dtype
    if cache.dtype == torch.uint8:
        width, dtype = row_bytes(kv_lora_rank, width - kv_lora_rank), torch.uint8
    if cache.shape[2] != width or cache.dtype != dtype or not cache.is_contiguous():
        raise ValueError(
            f"query {tuple(query.shape)} {query.dtype} and cache {tuple(cache.shape)} {cache.dtype} "
            "do not fit [B, H, D + R] and contiguous [P, page_size, D + R], or the bytes of fp8 rows"
        )
