"""Grouped-query attention over paged keys and values.

Letters: T tokens, H query heads, G key/value heads, D head width. A page holds its tokens' rotated keys, then their
values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from headrace_kernels.gqa_decode import gqa_decode, plan_gqa_decode
from headrace_kernels.gqa_prefill import gqa_prefill
from headrace_kernels.latent_store import latent_store
from headrace_kernels.linear import Linear
from headrace_kernels.rms_norm import rms_norm
from headrace_kernels.rope import rope
from headrace_kernels.split_ranges import SplitPlan
from torch import Tensor

from headrace_core.families.config import GqaShape
from headrace_core.model.group_linear import OntoResidual
from headrace_core.model.op_timer import OpTimer
from headrace_core.model.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class GqaWeights:
    """Weights of one layer; `input_proj` [(H + 2 * G) * D, N] yields queries, keys and values at once.

    `query_norm` and `key_norm` [D] are of the heads; None: they are not normalised.
    """

    input_proj: Linear
    output_proj: OntoResidual
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


class GroupedQueryAttentionLayer:
    """`Attention` by keys and values."""

    def __init__(self, shape: GqaShape, num_heads: int, weights: GqaWeights) -> None:
        self._shape = shape
        self._num_heads = num_heads
        self._weights = weights
        self._scale = shape.head_dim**-0.5

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
        groups, weights = self._shape.num_kv_heads, self._weights
        heads = weights.input_proj.after_norm(x, norm_weight, eps).unflatten(1, (-1, self._shape.head_dim))
        timer.mark("attention_norm+qkv_proj")
        query, key = self._rotated(heads[:, :-groups], eps, angles)
        _store(cache, key, heads[:, -groups:], key_value_rows(step.slot_mapping, cache.shape[2]))
        timer.mark("rope_and_cache")
        outputs: list[Tensor] = []
        if step.decode is not None:
            rows = step.decode
            out = gqa_decode(
                query[: rows.num_rows].contiguous(),
                cache,
                rows.block_table,
                rows.context_lens,
                scale=self._scale,
                slots=rows.slots,
                plan=rows.plan,
            )
            outputs.append(out.flatten(1))
            timer.mark("attention_decode")
        for group in step.prefill:
            out = gqa_prefill(
                query[group.first : group.end],
                cache,
                group.slots,
                group.query_starts,
                group.key_starts,
                scale=self._scale,
            )
            outputs.append(out.flatten(1))
            timer.mark("attention_prefill")
        out = weights.output_proj.added_to(x, outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        timer.mark("output_proj")
        return out

    def _rotated(self, heads: Tensor, eps: float, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return queries [T, H, D] and keys [T, G, D] of `heads` [T, H + G, D], normalised if they are, and rotated."""
        query_norm, key_norm = self._weights.query_norm, self._weights.key_norm
        if query_norm is not None and key_norm is not None:
            query, key = heads[:, : self._num_heads], heads[:, self._num_heads :]
            query = rms_norm(query.reshape(-1, self._shape.head_dim), query_norm, eps).view(query.shape)
            key = rms_norm(key.reshape(-1, self._shape.head_dim), key_norm, eps).view(key.shape)
            return rope(query, *angles, is_interleaved=False), rope(key, *angles, is_interleaved=False)
        rotated = rope(heads, *angles, is_interleaved=False)
        return rotated[:, : self._num_heads], rotated[:, self._num_heads :]

    def plan_decode(self, context_lens: Tensor, page_size: int) -> SplitPlan | None:
        """See `Attention`."""
        return plan_gqa_decode(context_lens, page_size, self._shape.num_kv_heads)


def _store(cache: Tensor, key: Tensor, value: Tensor, slot_rows: tuple[Tensor, Tensor]) -> None:
    rows = cache.view(-1, cache.shape[3] * cache.shape[4])
    latent_store(key.flatten(1), rows, slot_rows[0])
    latent_store(value.flatten(1), rows, slot_rows[1])


def key_value_rows(slot_mapping: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a flat cache in which the keys and the values of `slot_mapping` [T] lie; -1 stays negative."""
    # A page's values follow its page_size keys, so page p starts at row 2 * p * page_size.
    keys = slot_mapping + slot_mapping.div(page_size, rounding_mode="floor") * page_size
    return keys, keys + page_size
