"""The experts of a layer in a group of ranks: `headrace_kernels.experts.Experts`, for each form of `ExpertsForm`.

Letters: T tokens, N hidden, K experts per token, S shared experts, E routed experts. Columns K ... K + S - 1 of a
token's choice are the shared ones, numbered from E on.

Kernels see the experts held here alone, by their numbers here; assignments of others are -1 or not there at all, and
cost nothing. A shared expert's part joins once: its columns are divided like any other's, or it is computed where the
token is.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from headrace_kernels.experts import Experts
from headrace_kernels.routing_rule import RoutedTokens
from torch import Tensor

from headrace_core.batch.step import Chunk
from headrace_core.expert_moves import Slots
from headrace_core.model.dispatch import Dispatcher
from headrace_core.model.feed_forward import LayerExperts
from headrace_core.ranks.group import RankGroup, Ranks, ordered_sum
from headrace_core.ranks.layout import share


class LaneCounts(threading.local):
    """How many tokens each lane has in the step that is computed; the model says so before its layers.

    Each thread is told for itself: two micro-batches are computed on two.
    """

    def __init__(self, num_lanes: int = 1) -> None:
        self.counts = [0] * num_lanes

    def set(self, chunks: Sequence[Chunk]) -> None:
        """Count the tokens of a step's chunks."""
        self.counts = [0] * len(self.counts)
        for chunk in chunks:
            self.counts[chunk.lane] += len(chunk.token_ids)


class SummedExperts:
    """All ranks have all tokens: each adds up what is here, and the ranks' sums are added in their order.

    `numbers` [E + S + 1] int64 has the number here of each expert, -1: elsewhere, and at its end, for padding, -1;
    None: all are here, in columns. `shared` is one expert, of this rank's columns of the shared ones; None: they are
    among `local`, or there are none.
    """

    def __init__(self, local: LayerExperts, numbers: Tensor | None, shared: Experts | None, world: RankGroup) -> None:
        self._local = local
        self._numbers = numbers
        self._shared = shared
        self._world = world

    def block_size(self, num_assignments: int) -> int | None:
        """See `Experts`; experts by numbers of their own are sorted where they are computed."""
        return self._local.block_size(num_assignments) if self._numbers is None else None

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `Experts`."""
        part = torch.zeros_like(residual)
        if self._shared is not None:
            part = self._shared(_all_of(routed.x, 1), part)
        if self._numbers is not None:
            routed = routed._replace(experts=self._numbers[routed.experts])
        return self._world.all_sum(self._local(routed, part), onto=residual)


class GatheredExperts:
    """Each rank has a part of all columns: all tokens come here, partial sums go back."""

    def __init__(self, local: Experts, lanes: LaneCounts, ranks: Ranks) -> None:
        self._local = local
        self._lanes = lanes
        self._ranks = ranks

    def block_size(self, num_assignments: int) -> None:
        """See `Experts`; nothing is sorted before all tokens are here."""

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `Experts`; without tokens, too."""
        world, layout = self._ranks.world, self._ranks.layout
        counts = [
            len(share(self._lanes.counts[layout.lane(rank)], layout.place(rank), layout.attention_tp))
            for rank in range(world.size)
        ]
        own = own_share(len(residual), self._ranks)
        count = counts[world.rank]
        send, receive = [count] * world.size, counts
        x, experts, weights = (
            world.exchange(each[own].repeat(world.size, 1), send, receive)
            for each in (routed.x, routed.experts, routed.weights)
        )
        parts = self._local(RoutedTokens(x, experts, weights, None), torch.zeros_like(x)) if len(x) else x
        back = world.exchange(parts, receive, send).view(world.size, count, parts.shape[1])
        return gather_shares(ordered_sum(back, residual[own]), len(residual), self._ranks)


class DispatchedExperts:
    """Whole experts: tokens travel to theirs. `shared`: all of the shared ones; None: there are none."""

    def __init__(
        self, local: Experts, num_shared: int, shared: Experts | None, dispatcher: Dispatcher, ranks: Ranks
    ) -> None:
        self.local = local
        self._num_shared = num_shared
        self._shared = shared
        self._dispatcher = dispatcher
        self._ranks = ranks

    def switch(self, local: Experts, slots: Slots) -> None:
        """Compute with `local`, the experts of this rank's slots, from now on; on all ranks between the same two steps.

        No bit changes by that: see `dispatch`.
        """
        self.local = local
        self._dispatcher.place(slots)

    def block_size(self, num_assignments: int) -> None:
        """See `Experts`; what comes is sorted where it is computed."""

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `Experts`; without tokens, too."""
        own = own_share(len(residual), self._ranks)
        x, onto, num_routed = routed.x[own], residual[own], routed.experts.shape[1] - self._num_shared
        experts, weights = routed.experts[own, :num_routed], routed.weights[own, :num_routed]
        underway = self._dispatcher.send(x, experts)
        if self._shared is not None and len(x):
            # While tokens travel.
            onto = self._shared(_all_of(x, self._num_shared), onto)
        sent = self._dispatcher.receive(underway, x)
        outputs = sent.rows
        if len(outputs):
            one = torch.ones(len(outputs), 1, device=x.device)
            rows = RoutedTokens(outputs, sent.experts[:, None], one, None)
            outputs = self.local(rows, torch.zeros_like(outputs))
        return gather_shares(
            self._dispatcher.combine(outputs, sent, experts, weights, onto), len(residual), self._ranks
        )


def own_share(num_tokens: int, ranks: Ranks) -> slice:
    """Return which of its lane's tokens this rank sends to experts, so that each is sent once."""
    own = share(num_tokens, ranks.layout.place(ranks.rank), ranks.layout.attention_tp)
    return slice(own.start, own.stop)


def gather_shares(own: Tensor, num_tokens: int, ranks: Ranks) -> Tensor:
    """Return [T, N] for all of a lane's tokens; each rank of it has those of its `own_share`."""
    lane = ranks.lane
    if lane.size == 1:
        return own
    counts = [len(share(num_tokens, place, lane.size)) for place in range(lane.size)]
    return lane.exchange(own.repeat(lane.size, 1), [len(own)] * lane.size, counts)


def _all_of(x: Tensor, num_experts: int) -> RoutedTokens:
    """Return the tokens `x` [T, N] as passing all of `num_experts` experts with weight 1."""
    experts = torch.arange(num_experts, device=x.device).repeat(len(x), 1)
    return RoutedTokens(x, experts, torch.ones(experts.shape, device=x.device), None)
