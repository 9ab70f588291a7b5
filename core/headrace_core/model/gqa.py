"""Grouped-query attention over paged keys and values.

Letters: T tokens, H query heads, G key/value heads, D head width. A page holds its tokens' rotated keys, then their
values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from headrace_kernels.decode_linear import linear_add, norm_linear
from headrace_kernels.gqa_decode import gqa_decode, plan_gqa_decode
from headrace_kernels.gqa_prefill import gqa_prefill
from headrace_kernels.latent_store import latent_store
from headrace_kernels.linear import Linear
from headrace_kernels.rope import rope
from headrace_kernels.split_ranges import SplitPlan
from torch import Tensor

from headrace_core.checkpoint.config import GqaShape
from headrace_core.model.fused_decode import FusedRows
from headrace_core.model.op_timer import OpTimer
from headrace_core.model.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class GqaWeights:
    """Weights of one layer; `input_proj` [(H + 2 * G) * D, N] yields queries, keys and values at once."""

    input_proj: Linear
    output_proj: Linear


class GroupedQueryAttentionLayer:
    """`Attention` and `FusedAttention` by keys and values."""

    def __init__(self, shape: GqaShape, num_heads: int, weights: GqaWeights) -> None:
        self._shape = shape
        self._num_heads = num_heads
        self._weights = weights
        self._scale = shape.head_dim**-0.5

    def __call__(
        self, x: Tensor, angles: tuple[Tensor, Tensor], step: StepInputs, cache: Tensor, timer: OpTimer
    ) -> Tensor:
        """See `Attention`."""
        num_tokens, groups = len(x), self._shape.num_kv_heads
        heads = self._weights.input_proj(x).view(num_tokens, -1, self._shape.head_dim)
        timer.mark("qkv_proj")
        rotated = rope(heads[:, :-groups], *angles, is_interleaved=False)
        query, key = rotated[:, : self._num_heads], rotated[:, self._num_heads :]
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
        out = self._weights.output_proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        timer.mark("output_proj")
        return out

    def decode(self, x: Tensor, norm_weight: Tensor, eps: float, rows: FusedRows, cache: Tensor) -> Tensor:
        """See `FusedAttention`."""
        weights, groups = self._weights, self._shape.num_kv_heads
        projected = norm_linear(x, norm_weight, weights.input_proj.weight, eps, weights.input_proj.bias)
        heads = projected.unflatten(1, (-1, self._shape.head_dim))
        rotated = rope(heads[:, :-groups], *rows.angles, is_interleaved=False)
        query, key = rotated[:, : self._num_heads], rotated[:, self._num_heads :]
        _store(cache, key, heads[:, -groups:], key_value_rows(rows.slot_mapping, cache.shape[2]))
        out = gqa_decode(
            query.contiguous(), cache, rows.block_table, rows.context_lens, scale=self._scale, plan=rows.plan
        )
        return linear_add(out.flatten(1), weights.output_proj.weight, x, weights.output_proj.bias)

    def plan_decode(self, context_lens: Tensor, page_size: int) -> SplitPlan | None:
        """See `FusedAttention`."""
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
