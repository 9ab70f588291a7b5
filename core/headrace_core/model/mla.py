"""Multi-head latent attention over the paged latent cache: naive for prompt chunks, absorbed for decode rows.

The cache has rows of the computing type, or fp8 rows (`headrace_kernels.latent_fp8`). What a step computes it writes
first and reads back, so that a token's latent is the same for the step that makes it as for every later one.

Letters: T tokens, H heads, Dn width of a head without rope, R rope width, D latent width, Dv value width. A token
caches its normalised `c_kv` [D], then its rotated `k_pe` [R].

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from headrace_kernels.decode_linear import linear_add, norm_linear
from headrace_kernels.latent_load import latent_load
from headrace_kernels.latent_store import latent_norm_rope_store
from headrace_kernels.linear import Linear
from headrace_kernels.mla_decode import mla_decode, mla_decode_values, plan_mla_decode
from headrace_kernels.mla_prefill import mla_prefill
from headrace_kernels.mla_prologue import mla_prologue
from headrace_kernels.rms_norm import rms_norm
from headrace_kernels.rope import rope
from headrace_kernels.split_ranges import SplitPlan
from torch import Tensor

from headrace_core.checkpoint.config import MlaShape
from headrace_core.model.fused_decode import FusedRows
from headrace_core.model.op_timer import OpTimer
from headrace_core.model.step_inputs import DecodeRows, StepInputs

# The model's own code fixes the epsilon of the two inner norms, whatever rms_norm_eps says.
_LORA_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class MlaWeights:
    """Weights of one layer.

    `input_proj` [Dq + D + R, N] yields the query's latent (or, without q_lora_rank, the query), `c_kv` and `k_pe` at
    once. `w_uk` [H, Dn, D] and `w_uv` [H, Dv, D] are plain, because prompt chunks and decode rows use them differently.
    """

    input_proj: Linear
    query_norm: Tensor | None
    query_b: Linear | None
    kv_norm: Tensor
    w_uk: Tensor
    w_uv: Tensor
    output_proj: Linear


class LatentAttentionLayer:
    """`Attention` and `FusedAttention` by latents."""

    def __init__(self, shape: MlaShape, num_heads: int, scale: float, weights: MlaWeights) -> None:
        self._shape = shape
        self._num_heads = num_heads
        self._scale = scale
        self._weights = weights

    def __call__(
        self, x: Tensor, angles: tuple[Tensor, Tensor], step: StepInputs, cache: Tensor, timer: OpTimer
    ) -> Tensor:
        """See `Attention`."""
        flat_cache = cache.view(-1, cache.shape[2])
        query = self._project(x, angles, step.slot_mapping, flat_cache, timer)
        outputs: list[Tensor] = []
        if step.decode is not None:
            outputs.append(self._decode(query[: step.decode.num_rows], step.decode, cache, timer))
        for group in step.prefill:
            rows = latent_load(
                flat_cache,
                group.slots,
                kv_lora_rank=self._shape.kv_lora_rank,
                rope_dim=self._shape.rope_dim,
                dtype=query.dtype,
            )
            out = mla_prefill(
                query[group.first : group.end],
                rows,
                self._weights.w_uk,
                self._weights.w_uv,
                group.query_starts,
                group.key_starts,
                scale=self._scale,
            )
            outputs.append(out.flatten(1))
            timer.mark("kv_up_proj+attention_naive")
        out = self._weights.output_proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        timer.mark("output_proj")
        return out

    def decode(self, x: Tensor, norm_weight: Tensor, eps: float, rows: FusedRows, cache: Tensor) -> Tensor:
        """See `FusedAttention`."""
        shape, weights = self._shape, self._weights
        projected = norm_linear(x, norm_weight, weights.input_proj.weight, eps, weights.input_proj.bias)
        query_dim = projected.shape[1] - shape.kv_lora_rank - shape.rope_dim
        query, c_kv, k_pe = projected.split([query_dim, shape.kv_lora_rank, shape.rope_dim], dim=1)
        if weights.query_b is not None:
            query = norm_linear(query, weights.query_norm, weights.query_b.weight, _LORA_NORM_EPS, weights.query_b.bias)
        absorbed = mla_prologue(
            query.unflatten(1, (self._num_heads, -1)),
            weights.w_uk,
            c_kv,
            k_pe,
            weights.kv_norm,
            *rows.angles,
            cache.view(-1, cache.shape[2]),
            rows.slot_mapping,
            eps=_LORA_NORM_EPS,
            is_interleaved=shape.is_rope_interleaved,
        )
        values = mla_decode_values(
            absorbed,
            cache,
            rows.block_table,
            rows.context_lens,
            weights.w_uv,
            scale=self._scale,
            plan=rows.plan,
        )
        return linear_add(values, weights.output_proj.weight, x, weights.output_proj.bias)

    def plan_decode(self, context_lens: Tensor, page_size: int) -> SplitPlan | None:
        """See `FusedAttention`."""
        return plan_mla_decode(context_lens, page_size, self._num_heads)

    def _project(
        self, x: Tensor, angles: tuple[Tensor, Tensor], slot_mapping: Tensor, flat_cache: Tensor, timer: OpTimer
    ) -> Tensor:
        """Return queries [T, H, Dn + R], rotated; write the tokens' rows to the cache [S, D + R or an fp8 row]."""
        shape, weights = self._shape, self._weights
        projected = weights.input_proj(x)
        timer.mark("q_proj+kv_down_proj" if weights.query_b is None else "q_down_proj+kv_down_proj")
        query_dim = projected.shape[1] - shape.kv_lora_rank - shape.rope_dim
        query, c_kv, k_pe = projected.split([query_dim, shape.kv_lora_rank, shape.rope_dim], dim=1)
        if weights.query_b is not None and weights.query_norm is not None:
            query = rms_norm(query, weights.query_norm, _LORA_NORM_EPS)
            timer.mark("latent_norms_and_rope")
            query = weights.query_b(query)
            timer.mark("q_up_proj")
        query = query.reshape(len(x), self._num_heads, -1)
        cos, sin = angles
        interleaved = shape.is_rope_interleaved
        query_pe = query[..., shape.nope_dim :]
        query_pe.copy_(rope(query_pe, cos, sin, is_interleaved=interleaved))
        latent_norm_rope_store(
            c_kv,
            k_pe,
            weights.kv_norm,
            cos,
            sin,
            flat_cache,
            slot_mapping,
            eps=_LORA_NORM_EPS,
            is_interleaved=interleaved,
        )
        timer.mark("latent_norms_and_rope")
        return query

    def _decode(self, query: Tensor, decode: DecodeRows, cache: Tensor, timer: OpTimer) -> Tensor:
        """Return [B, H * Dv] for queries [B, H, Dn + R]."""
        nope_dim = self._shape.nope_dim
        absorbed = torch.bmm(query[..., :nope_dim].transpose(0, 1), self._weights.w_uk).transpose(0, 1)
        timer.mark("absorb_query")
        latents = mla_decode(
            torch.cat((absorbed, query[..., nope_dim:]), dim=-1),
            cache,
            decode.block_table,
            decode.context_lens,
            kv_lora_rank=self._shape.kv_lora_rank,
            scale=self._scale,
            slots=decode.slots,
        )
        timer.mark("attention_absorbed")
        values = torch.bmm(latents.transpose(0, 1), self._weights.w_uv.transpose(1, 2)).transpose(0, 1).flatten(1)
        timer.mark("absorb_value")
        return values
