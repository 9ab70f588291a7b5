"""Weights in 8 bits, each output a scale of its own, for activations in 8 bits, each row a scale of its own.

Shapes: T tokens, I inputs, O outputs. A row x becomes whole numbers round(127 x / max|x|) and the scale max|x| / 127; a
product is the sum of whole numbers, exact in any order, times both scales: `x @ weight.T` within about 1 %. A row with
a term that is not finite yields NaN.

Half of bfloat16's bytes, so half of its time where weights are what is read. On a CPU alone.
Source: dynamic per-token, per-channel quantisation, as in LLM.int8 (arXiv 2208.07339) without its outliers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST = 127
MOST_INPUTS = (1 << 31) // (MOST * MOST) - 1
"""Of a layer: the sum of so many products still fits 32 bits."""
_SMALLEST = 1e-30


class Int8Weight(NamedTuple):
    """Whole numbers, int8, in the order of whoever multiplies, and the scale of each output, float32."""

    values: Tensor
    scales: Tensor


def quantise(rows: Tensor) -> Int8Weight:
    """Return `rows` [..., I] as int8 values [..., I] and scales [..., 1]; a row of (nearly) zeros has scale 0."""
    wide = rows.float()
    most = wide.abs().amax(dim=-1, keepdim=True)
    is_zero = most < _SMALLEST
    scales = torch.where(is_zero, 0.0, most / MOST) + 0 * wide.sum(dim=-1, keepdim=True)
    values = (wide * torch.where(is_zero, 0.0, MOST / most)).round().nan_to_num().clamp(-MOST, MOST)
    return Int8Weight(values.to(torch.int8), scales)


def check_width(num_inputs: int) -> None:
    """Refuse a layer whose sums might not fit.

    Raises:
        ValueError: it has more inputs than `MOST_INPUTS`.
    """
    if num_inputs > MOST_INPUTS:
        raise ValueError(f"{num_inputs} inputs: sums of products in 8 bits are kept for at most {MOST_INPUTS}")
