"""The check that a model's heads can be shared by as many GPUs as somebody asks for."""

from __future__ import annotations

from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.model_shape import ModelShape


def check_divides(shape: ModelShape, parallel: Parallelism) -> None:
    """Refuse a division that no engine computes.

    Raises:
        ValueError: tensor parallelism does not divide the heads, or expert parallelism the experts.
    """
    if shape.num_heads % parallel.tp:
        raise ValueError(f"tp {parallel.tp} does not divide the {shape.num_heads} heads of {shape.name}")
    if shape.moe and shape.moe.num_experts % parallel.ep:
        raise ValueError(f"ep {parallel.ep} does not divide the {shape.moe.num_experts} experts of {shape.name}")
