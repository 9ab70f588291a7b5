"""The check that a model's heads can be shared by as many GPUs as somebody asks for."""

from __future__ import annotations

from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.model_shape import GqaShape, ModelShape


def check_divides(shape: ModelShape, parallel: Parallelism) -> None:
    """Refuse a division that no engine computes.

    Raises:
        ValueError: tensor parallelism does not divide the heads, or expert parallelism the experts.
    """
    if problem := _problem(shape, parallel):
        raise ValueError(problem)


def is_divisible(shape: ModelShape, parallel: Parallelism) -> bool:
    """Return whether `check_divides` would let it pass."""
    return not _problem(shape, parallel)


def _problem(shape: ModelShape, parallel: Parallelism) -> str:
    if shape.num_heads % parallel.tp:
        return f"tp {parallel.tp} does not divide the {shape.num_heads} heads of {shape.name}"
    if isinstance(shape.attention, GqaShape) and _unshared(shape.attention.num_kv_heads, parallel.tp):
        heads = shape.attention.num_kv_heads
        return f"tp {parallel.tp} neither divides the {heads} key-value heads of {shape.name} nor is a multiple of them"
    if shape.moe and shape.moe.num_experts % parallel.ep:
        return f"ep {parallel.ep} does not divide the {shape.moe.num_experts} experts of {shape.name}"
    return ""


def _unshared(num_kv_heads: int, tp: int) -> bool:
    return bool(num_kv_heads % tp and tp % num_kv_heads)
