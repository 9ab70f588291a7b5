"""Experts whose result is seen at a glance, and that say when they compute."""

from __future__ import annotations

from headrace_kernels.routing_rule import RoutedTokens
from torch import Tensor


class DoublingExperts:
    """`LayerExperts` that make twice a token of it, by its weights, and append their name to `said`."""

    def __init__(self, name: str, said: list[str]) -> None:
        self._name, self._said = name, said

    def block_size(self, num_assignments: int) -> int | None:
        """See `Experts`."""

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `Experts`."""
        self._said.append(self._name)
        return residual + 2 * routed.x * routed.weights.sum(dim=1, keepdim=True)
