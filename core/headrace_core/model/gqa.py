"""Grouped-query attention over paged keys and values.

Letters: T tokens, H query heads, G key/value heads, D head width. A page holds its tokens' rotated keys, then their
values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from headrace_kernels.gqa_decode import gqa_decode
from headrace_kernels.gqa_prefill import gqa_prefill
from headrace_kernels.latent_store import latent_store
from headrace_kernels.linear import Linear
from headrace_kernels.rope import rope
from torch import Tensor

from headrace_core.model.config import GqaShape
from headrace_core.model.op_timer import OpTimer
from headrace_core.model.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class GqaWeights:
    """Weights of one layer; `input_proj` [(H + 2 * G) * D, N] yields queries, keys and values at once."""

    input_proj: Linear
    output_proj: Linear


class GroupedQueryAttentionLayer:
    """`Attention` by keys and values."""

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
        _store(cache, key, heads[:, -groups:], step.slot_mapping)
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


def _store(cache: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
    page_size = cache.shape[2]
    rows = cache.view(-1, cache.shape[3] * cache.shape[4])
    # A page's values follow its page_size keys, so page p starts at row 2 * p * page_size.
    key_rows = slot_mapping + slot_mapping // page_size * page_size
    latent_store(key.flatten(1), rows, key_rows)
    latent_store(value.flatten(1), rows, key_rows + page_size)
