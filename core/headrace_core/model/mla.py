"""Multi-head latent attention over the paged latent cache: naive for prompt chunks, absorbed for decode rows.

The cache has rows of the computing type, or fp8 rows (`headrace_kernels.latent_fp8`). What a step computes it writes
first and reads back, so that a token's latent is the same for the step that makes it as for every later one.

Letters: T tokens, H heads, Dn width of a head without rope, R rope width, D latent width, Dv value width. A token
caches its normalised `c_kv` [D], then its rotated `k_pe` [R].

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from headrace_kernels.latent_load import latent_load
from headrace_kernels.latent_store import latent_norm_rope_store
from headrace_kernels.linear import Linear
from headrace_kernels.mla_decode import mla_decode_values, plan_mla_decode
from headrace_kernels.mla_prefill import mla_prefill
from headrace_kernels.mla_prologue import mla_prologue
from headrace_kernels.rope import rope
from headrace_kernels.split_ranges import SplitPlan
from torch import Tensor

from headrace_core.families.config import MlaShape
from headrace_core.model.group_linear import OntoResidual
from headrace_core.model.op_timer import OpTimer
from headrace_core.model.step_inputs import DecodeRows, PrefillGroup, StepInputs

# The model's own code fixes the epsilon of the two inner norms, whatever rms_norm_eps says.
LORA_NORM_EPS = 1e-6


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
    output_proj: OntoResidual


class LatentAttentionLayer:
    """`Attention` by latents."""

    def __init__(self, shape: MlaShape, num_heads: int, scale: float, weights: MlaWeights) -> None:
        self._shape = shape
        self._num_heads = num_heads
        self._scale = scale
        self._weights = weights
        query = "q_proj" if weights.query_b is None else "q_down_proj"
        self._input_name = f"attention_norm+{query}+kv_down_proj"

    def __call__(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        angles: tuple[Tensor, Tensor],
        step: StepInputs,
        cache: Tensor,
        timer: OpTimer,
    ) -> Tensor:
        """See `Attention`."""
        shape, weights = self._shape, self._weights
        projected = weights.input_proj.after_norm(x, norm_weight, eps)
        timer.mark(self._input_name)
        query_dim = projected.shape[1] - shape.kv_lora_rank - shape.rope_dim
        query, c_kv, k_pe = projected.split([query_dim, shape.kv_lora_rank, shape.rope_dim], dim=1)
        if weights.query_b is not None:
            query = weights.query_b.after_norm(query, weights.query_norm, LORA_NORM_EPS)
            timer.mark("q_up_proj")
        new = NewRows(query.unflatten(1, (self._num_heads, -1)), c_kv, k_pe, *angles, step.slot_mapping)
        num_decoded = 0 if step.decode is None else step.decode.num_rows
        outputs: list[Tensor] = []
        if step.decode is not None:
            outputs.append(self._decode(new.part(0, num_decoded), step.decode, cache, timer))
        if step.prefill:
            outputs += self.prefill(new.part(num_decoded, len(x)), num_decoded, step.prefill, cache, timer)
        out = weights.output_proj.added_to(x, outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        timer.mark("output_proj")
        return out

    def plan_decode(self, context_lens: Tensor, page_size: int) -> SplitPlan | None:
        """See `Attention`."""
        return plan_mla_decode(context_lens, page_size, self._num_heads)

    def _decode(self, new: NewRows, decode: DecodeRows, cache: Tensor, timer: OpTimer) -> Tensor:
        """Store the latents of decode rows and return their values [B, H * Dv], absorbed."""
        absorbed = self.absorb(new, cache.view(-1, cache.shape[2]))
        timer.mark("latent_norms_and_rope+absorb_query")
        values = mla_decode_values(
            absorbed,
            cache,
            decode.block_table,
            decode.context_lens,
            self._weights.w_uv,
            scale=self._scale,
            slots=decode.slots,
            plan=decode.plan,
        )
        timer.mark("attention_absorbed+absorb_value")
        return values

    def absorb(self, new: NewRows, rows: Tensor) -> Tensor:
        """Store tokens' latents in the cache's `rows` [S, D + R]; return their queries [T, H, D + R], absorbed."""
        return mla_prologue(
            new.query,
            self._weights.w_uk,
            new.c_kv,
            new.k_pe,
            self._weights.kv_norm,
            new.cos,
            new.sin,
            rows,
            new.slot_mapping,
            eps=LORA_NORM_EPS,
            is_interleaved=self._shape.is_rope_interleaved,
        )

    def prefill(
        self, new: NewRows, first: int, groups: Sequence[PrefillGroup], cache: Tensor, timer: OpTimer
    ) -> list[Tensor]:
        """Store the latents of prompt chunks, tokens `first` ... of the step; return each group's [T, H * Dv]."""
        shape, weights = self._shape, self._weights
        flat_cache, interleaved = cache.view(-1, cache.shape[2]), shape.is_rope_interleaved
        query_pe = new.query[..., shape.nope_dim :]
        query_pe.copy_(rope(query_pe, new.cos, new.sin, is_interleaved=interleaved))
        latent_norm_rope_store(
            new.c_kv,
            new.k_pe,
            weights.kv_norm,
            new.cos,
            new.sin,
            flat_cache,
            new.slot_mapping,
            eps=LORA_NORM_EPS,
            is_interleaved=interleaved,
        )
        if first == 0:
            # Behind decode rows, which have that name, it goes by what follows, next to which it is small.
            timer.mark("latent_norms_and_rope")
        outputs: list[Tensor] = []
        for group in groups:
            rows = latent_load(
                flat_cache,
                group.slots,
                kv_lora_rank=shape.kv_lora_rank,
                rope_dim=shape.rope_dim,
                dtype=new.query.dtype,
            )
            out = mla_prefill(
                new.query[group.first - first : group.end - first],
                rows,
                weights.w_uk,
                weights.w_uv,
                group.query_starts,
                group.key_starts,
                scale=self._scale,
            )
            outputs.append(out.flatten(1))
            timer.mark("kv_up_proj+attention_naive")
        return outputs


class NewRows(NamedTuple):
    """Tokens of a step: `query` [T, H, Dn + R], not rotated, `c_kv` [T, D], `k_pe` [T, R], angles [T, R/2], slots."""

    query: Tensor
    c_kv: Tensor
    k_pe: Tensor
    cos: Tensor
    sin: Tensor
    slot_mapping: Tensor

    def part(self, first: int, end: int) -> NewRows:
        """Return some tokens."""
        return NewRows(*(each[first:end] for each in self))
