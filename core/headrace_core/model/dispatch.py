"""Bring tokens to the ranks of their experts, and the experts' rows back.

Letters: T tokens of this rank, N hidden, K experts per token, R ranks, A rows for this rank's experts.

A token travels once to each rank that has one of its experts, with the numbers that they have there. Back comes a row
for each of its experts, unweighted, and whoever sent the token adds them up in the order of the experts' numbers: so
who holds an expert, or which of its replicas computed, changes no bit. A rank may send or get nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace_core.expert_moves import Slots
from headrace_core.expert_placement import Placement
from headrace_core.model.travelling_tokens import from_bytes, to_bytes
from headrace_core.ranks.dispatch_dtype import DispatchDtype
from headrace_core.ranks.group import Coming, RankGroup


@dataclass(frozen=True, slots=True)
class Sent:
    """Tokens on their way; made by `Dispatcher.send`, used up by `receive`.

    `coming` are packed rows, `receive` how many from each rank; `num_expected` and `places` as of `Dispatched`.
    """

    coming: Coming
    receive: list[int]
    num_expected: list[int]
    places: Tensor


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What came, and how the rows go back; made by `Dispatcher.receive`, used up by `combine`.

    `rows` [A, N] are tokens and `experts` [A] int64 which of this rank's experts each is for. `num_back`: how many of
    the rows are each rank's. `num_expected`: how many come back from each. `places` [T, K] int64: which of these is
    that of a token's expert, -1: none.
    """

    rows: Tensor
    experts: Tensor
    num_back: list[int]
    num_expected: list[int]
    places: Tensor


class Dispatcher:
    """Knows in which slots of which ranks the experts of a layer are."""

    def __init__(
        self, slots: Slots, world: RankGroup, device: torch.device, dtype: DispatchDtype = DispatchDtype.AUTO
    ) -> None:
        """Begin with experts in `slots`; tokens travel to them as `dtype`, and rows come back as they were computed."""
        self._world = world
        self._device = device
        self._dtype = dtype
        self.place(slots)

    def place(self, slots: Slots) -> None:
        """Send tokens to where their experts are in `slots` from now on; on all ranks between the same two steps."""
        owners = Placement(slots).owners()
        most = max(len(ranks) for ranks in owners)
        self._num_owners = torch.tensor([len(ranks) for ranks in owners], device=self._device)
        self._owners = torch.tensor(
            [[*ranks, *ranks[:1] * (most - len(ranks))] for ranks in owners], device=self._device
        )
        numbers = torch.full((self._world.size, len(owners)), -1, dtype=torch.int32)
        for rank, held in enumerate(slots):
            numbers[rank, list(held)] = torch.arange(len(held), dtype=torch.int32)
        self._numbers = numbers.to(self._device)
        """[R, E]: what number a rank's expert has there, its slot; -1: it has it not."""

    def send(self, x: Tensor, experts: Tensor) -> Sent:
        """Send `x` [T, N] to the ranks of `experts` [T, K] int64, -1: none; waits for their number alone.

        Whatever is computed before `receive` is computed while they travel.
        """
        size = self._world.size
        owner = self._owner(experts)
        goes = torch.stack([(owner == rank).any(dim=1) for rank in range(size)])
        to, token = goes.nonzero(as_tuple=True)
        is_there = owner[token] == to[:, None]
        numbers = self._numbers[to[:, None], experts[token].clamp(min=0)].masked_fill(~is_there, -1)
        counts: list[list[int]] = self._world.all_gather(goes.sum(dim=1)).tolist()
        receive = [of_rank[self._world.rank] for of_rank in counts]
        return Sent(
            coming=self._world.begin_exchange(
                _packed(to_bytes(x, self._dtype)[token], numbers), counts[self._world.rank], receive
            ),
            receive=receive,
            num_expected=[int(part.sum()) for part in is_there.sum(dim=1).split(counts[self._world.rank])],
            places=_places(token, is_there, experts),
        )

    def receive(self, sent: Sent, like: Tensor) -> Dispatched:
        """Wait for what comes for this rank's experts; `like` has the width and dtype of the tokens."""
        came = sent.coming.wait()
        width = self._dtype.token_bytes(like.shape[1], like.element_size())
        rows = from_bytes(came[:, :width], like, self._dtype)
        came_numbers = came[:, width:].contiguous().view(torch.int32)
        row, k = (came_numbers >= 0).nonzero(as_tuple=True)
        per_row = (came_numbers >= 0).sum(dim=1)
        return Dispatched(
            rows=rows[row],
            experts=came_numbers[row, k].long(),
            num_back=[int(part.sum()) for part in per_row.split(sent.receive)],
            num_expected=sent.num_expected,
            places=sent.places,
        )

    def combine(self, outputs: Tensor, sent: Dispatched, experts: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        """Return `onto` and each token's weighted rows, added in float32 in the order of experts, rounded once.

        Args:
            outputs: [A, N], what this rank's experts made of `sent.rows`.
            sent: what `receive` returned.
            experts: [T, K], as dispatched.
            weights: [T, K] float32.
            onto: [T, N], dtype of `outputs`.
        """
        rows = self._world.exchange(outputs, sent.num_back, sent.num_expected)
        if not len(rows):
            return onto
        order = experts.argsort(dim=1, stable=True)
        places, ordered = sent.places.gather(1, order), weights.gather(1, order)
        total = onto.float()
        for place, weight in zip(places.T, ordered.T, strict=True):
            # Multiplied, then added: one operation of both may be fused for some values of a tensor and not for others.
            product = rows[place.clamp(min=0)].float() * weight[:, None]
            total = total + product.masked_fill_((place < 0)[:, None], 0.0)
        return total.to(onto.dtype)

    def _owner(self, experts: Tensor) -> Tensor:
        """Return the rank that computes each assignment [T, K], -1: none; replicas take turns by tokens."""
        known = experts.clamp(min=0)
        turn = torch.arange(len(experts), device=experts.device)[:, None] + self._world.rank
        return self._owners[known, turn % self._num_owners[known]].masked_fill(experts < 0, -1)


def _places(token: Tensor, is_there: Tensor, experts: Tensor) -> Tensor:
    """Return [T, K]: the number of each assignment among those of the rows sent, in their order; -1: not sent."""
    row, k = is_there.nonzero(as_tuple=True)
    places = torch.full_like(experts, -1)
    places[token[row], k] = torch.arange(len(row), device=experts.device)
    return places


def _packed(tokens: Tensor, numbers: Tensor) -> Tensor:
    """Return uint8 [n, bytes]: each of `tokens` [n, bytes of a token], then its `numbers` [n, K] int32."""
    return torch.cat((tokens, numbers.view(torch.uint8)), dim=1)
