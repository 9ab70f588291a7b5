"""Rotary angles of positions, with YaRN's stretching, and what YaRN does to the attention's scale.

Source: huggingface/transformers modeling_rope_utils.py, _compute_yarn_parameters; YaRN (arXiv 2309.00071);
deepseek-ai/DeepSeek-V3 inference/model.py, precompute_freqs_cis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from headrace_core.errors import CheckpointError
from headrace_core.families.config import MlaShape, ModelConfig, RopeShape, YarnScaling
from headrace_core.request import MAX_COUNT


class RopeAngles:
    """Cosines and sines for the positions of a step."""

    def __init__(self, shape: RopeShape, device: str = "cpu") -> None:
        """Prepare the angles of `shape`.

        Raises:
            CheckpointError: BAD_CONFIG, they are of no use; says which fields they follow from.
        """
        fields = {"rope_theta": shape.theta, **_yarn_fields(shape.yarn)}
        self._frequencies = _checked(lambda: _frequencies(shape), "rotary frequencies", fields).to(device)
        factor = _checked(
            lambda: torch.tensor(_attention_factor(shape.yarn), dtype=torch.float64), "YaRN's attention factor", fields
        )
        self._factor = factor.item()

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [T, R/2] float32 for `positions` [T] int64."""
        angles = positions[:, None].float() * self._frequencies
        return angles.cos() * self._factor, angles.sin() * self._factor


def softmax_scale(shape: MlaShape, yarn: YarnScaling | None) -> float:
    """Return what latent attention multiplies its scores by.

    Raises:
        CheckpointError: BAD_CONFIG, it is of no use; says which fields it follows from.
    """
    scale = (shape.nope_dim + shape.rope_dim) ** -0.5
    if yarn is None or not yarn.mscale_all_dim:
        return scale

    def compute() -> Tensor:
        return torch.tensor(scale * _mscale(yarn.factor, yarn.mscale_all_dim) ** 2, dtype=torch.float64)

    return _checked(compute, "the attention's scale", _yarn_fields(yarn)).item()


def check_angles(config: ModelConfig) -> None:
    """Compute what is in here for `config`, before anything of its weights is read.

    Raises:
        CheckpointError: BAD_CONFIG.
    """
    RopeAngles(config.rope)
    if isinstance(config.attention, MlaShape):
        softmax_scale(config.attention, config.rope.yarn)


def _checked(compute: Callable[[], Tensor], what: str, fields: Mapping[str, object]) -> Tensor:
    """Return what `compute` does if in float32, times any position, all of it is finite and more than 0.

    Raises:
        CheckpointError: BAD_CONFIG, it isn't; the message says the `fields` that it follows from.
    """
    try:
        values = compute()
        is_good = bool((values.float() > 0).all() and (values * MAX_COUNT).float().isfinite().all())
        problem = "not all finite and greater than 0"
    except (ArithmeticError, ValueError) as error:
        values, is_good, problem = torch.empty(0), False, f"not to be computed ({error})"
    if not is_good:
        given = ", ".join(f"{name} {value!r}" for name, value in fields.items())
        raise CheckpointError(
            "BAD_CONFIG",
            f"config.json: {what} of {given} are {problem}; compare these fields with the model's source",
        )
    return values


def _yarn_fields(yarn: YarnScaling | None) -> dict[str, object]:
    """Return what YaRN's part of config.json says, by its names there."""
    if yarn is None:
        return {}
    return {
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_tokens,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
        "attention_factor": yarn.attention_factor,
    }


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
