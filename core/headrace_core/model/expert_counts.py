"""How many tokens chose each expert, counted where the model is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from headrace_kernels.routing_rule import Router
from torch import Tensor

from headrace_core.model.host_copies import HostBuffer


class ExpertCounts:
    """How often each expert was chosen, counted on the device. Engine thread only.

    A step sends its counts behind its launches, to pinned memory; who takes them after the step's tokens does not wait.
    """

    def __init__(self, num_layers: int, num_experts: int, num_per_token: int, device: torch.device) -> None:
        self._num_per_token = num_per_token
        self._counts = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self._one = torch.ones((), dtype=torch.int64, device=device)
        self._sent = HostBuffer(self._counts.shape, self._counts.dtype, device)
        self._since = torch.zeros(self._counts.shape, dtype=torch.int64)

    @staticmethod
    def of(routers: Sequence[Router]) -> ExpertCounts:
        """Return the counts of mixtures with these routers, at least one, all alike."""
        weight, rule = routers[0].weight, routers[0].rule
        return ExpertCounts(len(routers), len(weight), rule.num_experts_per_token, weight.device)

    def add(self, experts: Tensor) -> None:
        """Count the choices of all mixture layers, [layers, T, K or more]."""
        chosen = experts[:, :, : self._num_per_token].flatten(1).long()
        self._counts.scatter_add_(1, chosen, self._one.expand_as(chosen))

    def send(self) -> None:
        """Let the next `take` return what was counted so far."""
        self._sent.receive(self._counts)

    def take(self) -> list[list[int]]:
        """Return the counts sent since the last call, by layer; what was counted and not sent is forgotten."""
        self._sent.wait()
        self._since += self._sent.values
        counts: list[list[int]] = self._sent.values.numpy().tolist()
        self._sent.values.zero_()
        self._counts.zero_()
        return counts

    def take_since(self) -> Tensor:
        """Return what `take` returned since the last call of this, summed: [layers, experts] int64, on the host."""
        counts, self._since = self._since, torch.zeros_like(self._since)
        return counts
