"""Sparse latent attention: over the tokens that an indexer chooses, by the kernels of attention over all.

The rows of a query's tokens are gathered, one after another in the order of their positions, and are the context that
`mla_decode_values` is over. So a query's cost does not grow with its context, but for the indexer's scores, and there
is no kernel of its own. Prompts that are no longer than what would be chosen go as with `mla`.

Letters as there; a token caches `c_kv` [D], `k_pe` [R], then its key for the indexer [I].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from headrace_kernels.latent_store import latent_store
from headrace_kernels.mla_decode import mla_decode_values
from headrace_kernels.paged_slots import paged_slots
from headrace_kernels.rms_norm import rms_norm
from headrace_kernels.split_ranges import SplitPlan
from torch import Tensor

from headrace_core.families.config import MlaShape
from headrace_core.model.indexer import Choice, Indexer, IndexQueries
from headrace_core.model.mla import LORA_NORM_EPS, LatentAttentionLayer, MlaWeights, NewRows
from headrace_core.model.op_timer import OpTimer
from headrace_core.model.step_inputs import DecodeRows, PrefillGroup, StepInputs

BLOCK_BYTES = 64 << 20
"""Queries are computed so many at a time that neither scores nor gathered rows are more than this, if one is less."""
_GATHERED_PAGE = 16
"""Tokens in a page of gathered rows; kernels for GPUs want a multiple of 16."""


class SparseLatentAttentionLayer:
    """`Attention` by latents, over chosen tokens."""

    def __init__(self, shape: MlaShape, num_heads: int, scale: float, weights: MlaWeights, indexer: Indexer) -> None:
        """As `LatentAttentionLayer`; `weights.input_proj` yields the indexer's key, too, last."""
        self._shape = shape
        self._num_heads = num_heads
        self._scale = scale
        self._weights = weights
        self._indexer = indexer
        self._whole = LatentAttentionLayer(shape, num_heads, scale, weights)

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
        weights, shape, index_dim = self._weights, self._shape, self._indexer.shape.head_dim
        assert weights.query_b is not None, "the config was checked"
        assert weights.query_norm is not None, "the config was checked"
        projected = weights.input_proj.after_norm(x, norm_weight, eps)
        query_dim = projected.shape[1] - shape.kv_lora_rank - shape.rope_dim - index_dim
        latent, c_kv, k_pe, key = projected.split([query_dim, shape.kv_lora_rank, shape.rope_dim, index_dim], dim=1)
        timer.mark("attention_norm+q_down_proj+kv_down_proj+index_key")
        rows = cache.view(-1, cache.shape[2])
        latents, keys = rows[:, : shape.kv_lora_rank + shape.rope_dim], rows[:, -index_dim:]
        key = self._indexer.keys(key, *angles)
        latent_store(key, keys, step.slot_mapping)
        query = weights.query_b.after_norm(latent, weights.query_norm, LORA_NORM_EPS).unflatten(
            1, (self._num_heads, -1)
        )
        timer.mark("q_up_proj")
        index = self._indexer.queries(latent, weights.query_norm, LORA_NORM_EPS, rms_norm(x, norm_weight, eps), angles)
        # Nothing else would show that a choice was none: attention over other tokens is as finite.
        is_sound = index.are_finite() & key.isfinite().all(dim=1)
        query = query.masked_fill(~is_sound[:, None, None], float("nan"))
        new = NewRows(query, c_kv, k_pe, *angles, step.slot_mapping)
        timer.mark("index_queries")
        num_decoded = 0 if step.decode is None else step.decode.num_rows
        outputs: list[Tensor] = []
        if step.decode is not None:
            first = slice(0, num_decoded)
            absorbed = self._absorb(new.part(0, num_decoded), latents, timer)
            outputs += self._decode(absorbed, index[first], step.decode, cache.shape[1], latents, keys)
        if step.prefill:
            rest = new.part(num_decoded, len(x))
            if _longest(step.prefill) <= self._indexer.shape.top_k:
                outputs += self._whole.prefill(
                    rest, num_decoded, step.prefill, latents.unflatten(0, cache.shape[:2]), timer
                )
            else:
                absorbed = self._absorb(rest, latents, timer)
                outputs += self._prompts(
                    absorbed, index[slice(num_decoded, None)], num_decoded, step.prefill, latents, keys
                )
        timer.mark("attention_over_chosen")
        out = weights.output_proj.added_to(x, outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        timer.mark("output_proj")
        return out

    def plan_decode(self, context_lens: Tensor, page_size: int) -> SplitPlan | None:
        """See `Attention`: None, how much is chosen is known in the layer."""
        return None

    def _absorb(self, new: NewRows, latents: Tensor, timer: OpTimer) -> Tensor:
        """Store the latents of tokens and return their queries [T, H, D + R], absorbed."""
        absorbed = self._whole.absorb(new, latents)
        # A token need not choose itself.
        is_sound = latents.index_select(0, new.slot_mapping).isfinite().all(dim=1)
        absorbed = absorbed.masked_fill(~is_sound[:, None, None], float("nan"))
        timer.mark("latent_norms_and_rope+absorb_query")
        return absorbed

    def _decode(
        self, absorbed: Tensor, index: IndexQueries, decode: DecodeRows, page_size: int, latents: Tensor, keys: Tensor
    ) -> Iterator[Tensor]:
        """Yield the values [B, H * Dv] of decode rows, in parts."""
        slots = decode.slots
        if slots is None:
            slots = paged_slots(decode.block_table, decode.context_lens, page_size)
        lengths = decode.context_lens.long()
        for part in self._parts(len(absorbed), slots.shape[1], num_keys_each=slots.shape[1]):
            of_part = slots[part]
            choice = self._indexer.choose(index[part], keys[of_part], lengths[part])
            yield self._attend(absorbed[part], of_part.gather(1, choice.keys), choice, latents)

    def _prompts(
        self,
        absorbed: Tensor,
        index: IndexQueries,
        first: int,
        groups: Sequence[PrefillGroup],
        latents: Tensor,
        keys: Tensor,
    ) -> Iterator[Tensor]:
        """Yield the values [T, H * Dv] of prompt chunks, tokens `first` ... of the step, in parts."""
        for group in groups:
            chunks = zip(pairwise(group.query_starts.tolist()), pairwise(group.key_starts.tolist()), strict=True)
            for (query_start, query_end), (key_start, key_end) in chunks:
                slots = group.slots[key_start:key_end]
                context = keys.index_select(0, slots)
                before, count = len(slots) - (query_end - query_start), query_end - query_start
                begin = group.first - first + query_start
                for part in self._parts(count, len(slots)):
                    visible = torch.arange(part.start, part.stop, device=slots.device) + before + 1
                    own = slice(begin + part.start, begin + part.stop)
                    choice = self._indexer.choose(index[own], context, visible)
                    yield self._attend(absorbed[own], slots[choice.keys], choice, latents)

    def _attend(self, absorbed: Tensor, slots: Tensor, choice: Choice, latents: Tensor) -> Tensor:
        """Return the values [T, H * Dv] of queries over the rows `slots` [T, K], as many as count."""
        num_queries, width = slots.shape
        num_pages = -(-width // _GATHERED_PAGE)
        padded = torch.nn.functional.pad(slots, (0, num_pages * _GATHERED_PAGE - width))
        gathered = latents.index_select(0, padded.flatten()).view(-1, _GATHERED_PAGE, latents.shape[1])
        table = torch.arange(len(gathered), dtype=torch.int32, device=slots.device).view(num_queries, num_pages)
        absorbed = absorbed.masked_fill(~choice.is_sound[:, None, None], float("nan"))
        return mla_decode_values(absorbed, gathered, table, choice.counts, self._weights.w_uv, scale=self._scale)

    def _parts(self, num_queries: int, num_keys: int, num_keys_each: int = 0) -> Iterator[slice]:
        """Yield runs of queries; see `BLOCK_BYTES`. `num_keys_each`: whose keys are gathered for each query alone."""
        shape = self._indexer.shape
        row = (self._shape.kv_lora_rank + self._shape.rope_dim) * min(num_keys, shape.top_k)
        most = max(row, shape.num_heads * num_keys, num_keys_each * shape.head_dim) * torch.float32.itemsize
        count = max(1, BLOCK_BYTES // most)
        for start in range(0, num_queries, count):
            yield slice(start, min(start + count, num_queries))


def _longest(groups: Sequence[PrefillGroup]) -> int:
    """Return how many tokens the longest context has."""
    return max(int(group.key_starts.diff().max()) for group in groups)
