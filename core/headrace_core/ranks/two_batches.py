"""The groups that two micro-batches of a step meet in: `turns` says when they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headrace_core.errors import StartupError
from headrace_core.ranks.group import Coming, OneRank, RankGroup, Ranks
from headrace_core.ranks.turns import Turns


class BatchesGroup:
    """`RankGroup` that is, for a thread that computes a micro-batch, the one that micro-batch has for itself."""

    def __init__(self, whole: RankGroup, of_batches: Sequence[RankGroup], turns: Turns) -> None:
        self.rank, self.size = whole.rank, whole.size
        self._whole = whole
        self._of_batches = of_batches
        self._turns = turns

    @property
    def sent_bytes(self) -> int:
        """See `RankGroup`; in all of them."""
        return sum(group.sent_bytes for group in (self._whole, *self._of_batches))

    @property
    def meeting_s(self) -> float:
        """See `RankGroup`; in all of them, but not while the other micro-batch computed."""
        return sum(group.meeting_s for group in (self._whole, *self._of_batches))

    def all_sum(self, part: Tensor, onto: Tensor | None = None) -> Tensor:
        """See `RankGroup`."""
        return self._group.all_sum(part, onto)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `RankGroup`."""
        return self._group.all_gather(x)

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """See `RankGroup`."""
        return self._group.exchange(rows, send, receive)

    def begin_exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Coming:
        """See `RankGroup`."""
        return self._group.begin_exchange(rows, send, receive)

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """See `RankGroup`."""
        return self._group.broadcast_bytes(data)

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """See `RankGroup`."""
        return self._group.gather_bytes(data)

    def part(self, parts: Sequence[Sequence[int]], on_wait: Callable[[], None] | None = None) -> RankGroup:
        """See `RankGroup`."""
        return self._whole.part(parts, on_wait)

    def set_timeout(self, seconds: float) -> None:
        """See `RankGroup`."""
        for group in (self._whole, *self._of_batches):
            group.set_timeout(seconds)

    def close(self) -> None:
        """See `RankGroup`."""
        self._turns.close()
        self._whole.close()

    @property
    def _group(self) -> RankGroup:
        number = self._turns.number
        return self._whole if number is None else self._of_batches[number]


def with_two_batches(ranks: Ranks, least_rows: int) -> Ranks:
    """Return the same place in groups that two micro-batches can meet in; all ranks call it.

    `least_rows`: see `Turns`; 0: never, and nothing changes.

    Raises:
        StartupError: BAD_RANKS, others have another number.
    """
    if ranks.layout.size == 1:
        return ranks
    of_ranks: list[int] = ranks.world.all_gather(torch.tensor(least_rows)).tolist()
    if len(set(of_ranks)) > 1:
        raise StartupError("BAD_RANKS", f"--two-batch-rows is {of_ranks}, rank by rank; give all the same")
    if not least_rows:
        return ranks
    turns, layout, whole = Turns(least_rows), ranks.layout, ranks.world
    everyone = [range(whole.size)]
    lanes = [layout.lane_ranks(lane) for lane in range(layout.num_lanes)]
    world = BatchesGroup(whole, [whole.part(everyone, turns.give) for _ in range(2)], turns)
    of_lane = [whole.part(lanes, turns.give) for _ in range(2)]
    lane = ranks.lane if isinstance(ranks.lane, OneRank) else BatchesGroup(ranks.lane, of_lane, turns)
    return Ranks(layout, world, lane, turns)
