"""Chooses the tokens that a query of sparse attention is over: those whose keys it likes best.

Letters: T queries, N hidden, Q width of the query's latent, J heads of the indexer, I width of one, R rope width, S
keys, K chosen at most. A token has one key for all heads, and it is cached.

    score[t, s] = sum over j of weight[t, j] / sqrt(J) * relu(query[t, j] · key[s] / sqrt(I))

Source: DeepSeek-V3.2-Exp; transformers 5.23 modeling_deepseek_v32.py, DeepseekV32Indexer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from headrace_kernels.linear import Linear
from headrace_kernels.rope import rope
from torch import Tensor

from headrace_core.families.config import IndexerShape

_KEY_NORM_EPS = 1e-6
"""The model's own code fixes it."""


@dataclass(frozen=True, slots=True)
class IndexerWeights:
    """Weights of one layer: `query` [J * I, Q], of the query's latent; `head_weights` [J, N] float32."""

    query: Linear
    key_norm: Tensor
    key_norm_bias: Tensor
    head_weights: Tensor


@dataclass(frozen=True, slots=True)
class IndexQueries:
    """Of T tokens: `heads` [T, J, I] float32, `weights` [T, J] float32."""

    heads: Tensor
    weights: Tensor

    def __getitem__(self, part: slice) -> IndexQueries:
        """Return some tokens' part."""
        return IndexQueries(self.heads[part], self.weights[part])

    def are_finite(self) -> Tensor:
        """Return [T] bool."""
        return self.heads.isfinite().all(dim=2).all(dim=1) & self.weights.isfinite().all(dim=1)


class Choice(NamedTuple):
    """What T queries take: `keys` [T, K] int64, rising as far as they count, and `counts` [T] int32, how many do.

    `is_sound` [T] bool: false where a score was not a number, so that nobody knows what the choice should have been.
    """

    keys: Tensor
    counts: Tensor
    is_sound: Tensor


class Indexer:
    """Makes keys and queries of a step's tokens, and chooses."""

    def __init__(self, shape: IndexerShape, rope_dim: int, weights: IndexerWeights) -> None:
        self.shape = shape
        self._rope_dim = rope_dim
        self._weights = weights

    def keys(self, projected: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return what is cached of T tokens, [T, I], of their projections [T, I]; angles [T, R/2]."""
        weights = self._weights
        norm, bias = weights.key_norm, weights.key_norm_bias
        keys = torch.nn.functional.layer_norm(projected, norm.shape, norm, bias, _KEY_NORM_EPS)
        return self._rotated(keys[:, None], cos, sin)[:, 0]

    def queries(
        self, latent: Tensor, latent_norm: Tensor, latent_eps: float, x: Tensor, angles: tuple[Tensor, Tensor]
    ) -> IndexQueries:
        """Return the queries of T tokens.

        Args:
            latent: [T, Q], the query's latent, before its norm: `latent_norm` [Q], `latent_eps`.
            latent_norm: see `latent`.
            latent_eps: see `latent`.
            x: [T, N], normalised: what attention is computed of.
            angles: cosines and sines [T, R/2] float32 of the tokens' positions.
        """
        shape, weights = self.shape, self._weights
        heads = weights.query.after_norm(latent, latent_norm, latent_eps).unflatten(1, (shape.num_heads, -1))
        by_head = torch.nn.functional.linear(x.float(), weights.head_weights) * shape.num_heads**-0.5
        return IndexQueries(self._rotated(heads, *angles).float(), by_head)

    def choose(self, queries: IndexQueries, keys: Tensor, num_visible: Tensor) -> Choice:
        """Return which keys each query takes.

        Of equal scores the earlier token's counts as higher: whatever shares the step, the choice is the same.

        Args:
            queries: of T tokens.
            keys: [S, I], of one context, or [T, S, I], of one each.
            num_visible: [T] int64, at least 1: a query sees so many of the first keys.
        """
        scores = torch.matmul(queries.heads, keys.float().transpose(-1, -2)) * self.shape.head_dim**-0.5
        scores = torch.matmul(queries.weights[:, None], scores.relu_())[:, 0]
        num_keys = scores.shape[1]
        is_visible = torch.arange(num_keys, device=scores.device) < num_visible[:, None]
        is_sound = (scores.isfinite() | ~is_visible).all(dim=1)
        scores.masked_fill_(~is_visible, float("-inf"))
        num_chosen = min(self.shape.top_k, num_keys)
        chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_chosen]
        counts = num_visible.clamp(max=num_chosen)
        # What does not count goes behind: no key has so high a number.
        is_behind = torch.arange(num_chosen, device=chosen.device) >= counts[:, None]
        ordered = chosen.masked_fill(is_behind, num_keys).sort(dim=1).values
        return Choice(ordered.masked_fill_(is_behind, 0), counts.int(), is_sound)

    def _rotated(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return heads [T, J, I] of which the first R columns are turned; pairs lie half a width apart."""
        turned = rope(heads[..., : self._rope_dim], cos, sin, is_interleaved=False)
        return torch.cat((turned, heads[..., self._rope_dim :]), dim=-1)
