"""How each row of logits chooses its token: what sampling takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

NO_TOKEN = -1
"""Stands for a token in rows that have none to choose."""


@dataclass(frozen=True, slots=True)
class Draws:
    """How each of L rows chooses its token: tensors [L], on the device of the logits.

    Attributes:
        temperatures: float64; 0: the most probable token, the first of equals; nothing else is read for the row.
        top_k: int64; see `filter_logits`, also for the next two.
        top_p: float64.
        min_p: float64.
        seeds: int64, the 64 bits of a seed; see `counter_random.uniform`, also for the next two.
        sample_indices: int64.
        positions: int64.
    """

    temperatures: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    sample_indices: Tensor
    positions: Tensor
