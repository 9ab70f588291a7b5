"""A decode step in few launches: what a GPU captures and replays.

The network is that of `Model`; the operations are joined so that a layer is a handful of launches, each bound by the
bytes it reads. Per layer (docs/kernels.md, "Launches per decode layer"): input projection with its norm; rotation,
absorption and the write to the cache; attention by splits; their combination with W_UV; output projection with the
residual; router with its norm and the sort; experts' gate and up; experts' down with the residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from headrace_kernels.decode_linear import norm_linear
from headrace_kernels.split_ranges import SplitPlan
from torch import Tensor

from headrace_core.model.decode_batch import DecodeBatch
from headrace_core.model.decode_graphs import DecodeOutput
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.rope_angles import RopeAngles


@dataclass(frozen=True, slots=True)
class FusedRows:
    """What the layers of a step share: B rows, each a query over the first `context_lens` [B] tokens of its pages."""

    angles: tuple[Tensor, Tensor]
    slot_mapping: Tensor
    block_table: Tensor
    context_lens: Tensor
    plan: SplitPlan | None


@runtime_checkable
class FusedAttention(Protocol):
    """Attention that works on the residual stream. Engine thread only."""

    def decode(self, x: Tensor, norm_weight: Tensor, eps: float, rows: FusedRows, cache: Tensor) -> Tensor:
        """Return the residual stream [B, N] after this network for `x` [B, N]; write the rows' tokens to `cache`."""
        ...

    def plan_decode(self, context_lens: Tensor, page_size: int) -> SplitPlan | None:
        """Return how attention over `context_lens` [B] is shared out; one plan serves all layers of a step."""
        ...


@runtime_checkable
class FusedFeedForward(Protocol):
    """A feed-forward network that works on the residual stream. Engine thread only."""

    def decode(self, x: Tensor, norm_weight: Tensor, eps: float, slot_mapping: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream [B, N] after this network, and the experts chosen [B, K], if it has any.

        A row whose slot is -1 is padding: it need not be right, and chooses no expert (-1).
        """
        ...


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One layer."""

    attention_norm: Tensor
    attention: FusedAttention
    feed_forward_norm: Tensor
    feed_forward: FusedFeedForward


class FusedDecode:
    """Computes decode steps over one cache; launches only, nothing is brought to the host."""

    def __init__(
        self,
        layers: Sequence[FusedLayer],
        cache: KvCache,
        *,
        embedding: Tensor,
        norm: Tensor,
        head: Tensor,
        eps: float,
        angles: RopeAngles,
    ) -> None:
        self._layers = layers
        self._cache = cache
        self._embedding = embedding
        self._norm = norm
        self._head = head
        self._eps = eps
        self._angles = angles

    def __call__(self, batch: DecodeBatch) -> DecodeOutput:
        """Write the batch's tokens to their slots and return the logits that follow them."""
        page_size = self._cache.layout.page_size
        rows = FusedRows(
            angles=self._angles.at(batch.positions),
            slot_mapping=batch.slot_mapping,
            block_table=batch.block_table,
            context_lens=batch.context_lens,
            plan=self._layers[0].attention.plan_decode(batch.context_lens, page_size),
        )
        x = self._embedding.index_select(0, batch.token_ids)
        chosen: list[Tensor] = []
        for layer, pages in zip(self._layers, self._cache.layers, strict=True):
            x = layer.attention.decode(x, layer.attention_norm, self._eps, rows, pages)
            x, experts = layer.feed_forward.decode(x, layer.feed_forward_norm, self._eps, rows.slot_mapping)
            if experts is not None:
                chosen.append(experts)
        logits = norm_linear(x, self._norm, self._head, self._eps).float()
        return DecodeOutput(logits, torch.stack(chosen) if chosen else None)
