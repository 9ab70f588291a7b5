"""Muon: momentum whose direction is made orthogonal, for the matrices of the network.

Embeddings, head, router and norms stay with AdamW; `train.py` splits them.

Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), with the
quintic Newton-Schulz coefficients given there.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_STEPS = 5


def orthogonalise(x: Tensor) -> Tensor:
    """Push the singular values of each matrix of `x` [n, rows, cols] towards 1, in bfloat16."""
    a, b, c = _COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.bfloat16()
    x = x.mT if is_tall else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).bfloat16() + 1e-7)
    for _ in range(_NUM_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


class Muon:
    """The optimiser. Takes [out, in] weights and stacks [E, in, out] of them."""

    def __init__(self, weights: list[nn.Parameter], *, momentum: float = 0.95, decay: float = 0.01) -> None:
        self.lr = 0.0
        self._weights = weights
        self._momentum = momentum
        self._decay = decay
        self._moving = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight that has a gradient; equal shapes go through one batched product."""
        by_shape: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for weight, moving in zip(self._weights, self._moving, strict=True):
            if weight.grad is None:
                continue
            moving.lerp_(weight.grad, 1 - self._momentum)
            update = weight.grad.lerp(moving, self._momentum)
            stacked = update if update.dim() == 3 else update[None]
            by_shape[tuple(weight.shape[-2:])].append((weight, stacked))
        for items in by_shape.values():
            made = orthogonalise(torch.cat([stacked for _, stacked in items]))
            parts = made.split([stacked.shape[0] for _, stacked in items])
            for (weight, _), part in zip(items, parts, strict=True):
                self._move(weight, part)

    def _move(self, weight: nn.Parameter, direction: Tensor) -> None:
        rows, cols = weight.shape[-2:]
        fan_out, fan_in = (rows, cols) if weight.dim() == 2 else (cols, rows)
        step = self.lr * max(1.0, fan_out / fan_in) ** 0.5
        weight.mul_(1 - self.lr * self._decay)
        weight.add_(direction.to(weight.dtype).view_as(weight), alpha=-step)
