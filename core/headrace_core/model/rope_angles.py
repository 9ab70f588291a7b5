"""Rotary angles of positions, with YaRN's stretching, and what YaRN does to the attention's scale.

Source: huggingface/transformers modeling_rope_utils.py, _compute_yarn_parameters; YaRN (arXiv 2309.00071);
deepseek-ai/DeepSeek-V3 inference/model.py, precompute_freqs_cis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headrace_core.checkpoint.config import RopeShape, YarnScaling


class RopeAngles:
    """Cosines and sines for the positions of a step."""

    def __init__(self, shape: RopeShape, device: str = "cpu") -> None:
        self._frequencies = _frequencies(shape).to(device)
        self._factor = _attention_factor(shape.yarn)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [T, R/2] float32 for `positions` [T] int64."""
        angles = positions[:, None].float() * self._frequencies
        return angles.cos() * self._factor, angles.sin() * self._factor


def softmax_scale(query_dim: int, yarn: YarnScaling | None) -> float:
    """Return what latent attention multiplies its scores by."""
    scale = query_dim**-0.5
    if yarn is not None and yarn.mscale_all_dim:
        scale *= _mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _attention_factor(yarn: YarnScaling | None) -> float:
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def _frequencies(shape: RopeShape) -> Tensor:
    dim, yarn = shape.dim, shape.yarn
    periods = shape.theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
    if yarn is None:
        return 1.0 / periods
    low = _rotations_dim(yarn.beta_fast, shape, yarn)
    high = _rotations_dim(yarn.beta_slow, shape, yarn)
    if yarn.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (1.0 / (yarn.factor * periods)) * ramp + (1.0 / periods) * (1 - ramp)


def _rotations_dim(rotations: float, shape: RopeShape, yarn: YarnScaling) -> float:
    # The (fractional) pair that turns `rotations` times over the original context.
    turns = yarn.original_max_tokens / (rotations * 2 * math.pi)
    return shape.dim * math.log(turns) / (2 * math.log(shape.theta))
