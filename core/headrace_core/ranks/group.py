"""The ranks of a group, and what they ask of one another; a group of one asks nothing.

Each operation is a meeting: all ranks of the group call it, in the same order, with the same sizes. A rank that is
gone, or does not come within the group's time, makes it raise UnavailableError RANK_LOST on the others; the group is
then of no use, and what stands around it ends. Sums are added in the order of ranks, in float32, so that all ranks have
the same bits and a repetition has them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.turns import Turns


class Coming(Protocol):
    """Rows that are on their way."""

    def wait(self) -> Tensor:
        """Return what came, when it is here; once. Raises as the meeting would."""
        ...


class RankGroup(Protocol):
    """Some ranks that meet. One thread at a time."""

    rank: int
    """This process's number among them, from 0."""
    size: int

    @property
    def sent_bytes(self) -> int:
        """What this rank gave others so far; what a rank keeps for itself does not count."""
        ...

    @property
    def meeting_s(self) -> float:
        """Seconds that it spent in meetings so far; where these are launched, as on GPUs, what launching took."""
        ...

    def all_sum(self, part: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return `onto`, which all ranks have the same, plus the ranks' `part`s of its shape and dtype, on every rank.

        Added in float32, `onto` first, then by rank; rounded once.
        """
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return [size, *x.shape], every rank's `x`, of one shape and dtype on all."""
        ...

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Give each rank its rows, uneven and perhaps none; return what came, by rank.

        Args:
            rows: [sum of send, ...], those for rank 0 first.
            send: for each rank how many rows it is given.
            receive: for each rank how many it gives to this one: what it sends.

        Raises:
            ValueError: the counts are not one for each rank, or not those of `rows`; before anybody is met.
        """
        ...

    def begin_exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Coming:
        """As `exchange`, without waiting for what comes; `rows` may not be written before it did.

        The meeting is this call's, in the order of all; to wait is not one.
        """
        ...

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Return the `data` of rank 0, which others pass None; one meeting for up to 8,184 bytes, two for more."""
        ...

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return every rank's `data`, of any length."""
        ...

    def part(self, parts: Sequence[Sequence[int]], on_wait: Callable[[], None] | None = None) -> RankGroup:
        """Return a group of those ranks of `parts` that this rank is among; each rank is in exactly one of them.

        It meets apart from this group: on another thread, if one likes. `on_wait` is called in each of its sums,
        gatherings and exchanges, when what this rank gives is on its way and before it waits for what comes.
        """
        ...

    def set_timeout(self, seconds: float) -> None:
        """Let meetings from now on wait so long for a rank. Each rank says so for itself."""
        ...

    def close(self) -> None:
        """Leave; no meeting comes after. Waits for nobody."""
        ...


@dataclass(frozen=True, slots=True)
class Here:
    """`Coming` rows that are here."""

    rows: Tensor

    def wait(self) -> Tensor:
        """See `Coming`."""
        return self.rows


class OneRank:
    """A group of one: the identity."""

    rank = 0
    size = 1
    sent_bytes = 0
    meeting_s = 0.0

    def all_sum(self, part: Tensor, onto: Tensor | None = None) -> Tensor:
        """See `RankGroup`."""
        return part if onto is None else onto + part

    def all_gather(self, x: Tensor) -> Tensor:
        """See `RankGroup`; a view."""
        return x[None]

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """See `RankGroup`."""
        check_counts(rows, send, receive, 1)
        return rows

    def begin_exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Coming:
        """See `RankGroup`."""
        return Here(self.exchange(rows, send, receive))

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """See `RankGroup`."""
        assert data is not None, "rank 0 is the one that has them"
        return data

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """See `RankGroup`."""
        return [data]

    def part(self, parts: Sequence[Sequence[int]], on_wait: Callable[[], None] | None = None) -> RankGroup:
        """See `RankGroup`; nobody is waited for."""
        assert [list(part) for part in parts] == [[0]], parts
        return self

    def set_timeout(self, seconds: float) -> None:
        """See `RankGroup`."""

    def close(self) -> None:
        """See `RankGroup`."""


def check_counts(rows: Tensor, send: Sequence[int], receive: Sequence[int], size: int) -> None:
    """Raise ValueError unless `send` and `receive` are counts that `RankGroup.exchange` takes."""
    if len(send) != size or len(receive) != size or sum(send) != len(rows) or min(*send, *receive) < 0:
        raise ValueError(f"{len(rows)} rows, sent as {list(send)}, received as {list(receive)}, among {size} ranks")


def ordered_sum(parts: Tensor, onto: Tensor | None) -> Tensor:
    """Return `onto` [...] plus each of `parts` [R, ...], R at least 1, added in float32 in this order, rounded once."""
    total = parts[0].float() if onto is None else onto.float() + parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts.dtype)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process stands: the model's `layout`, all ranks of it, `world`, and those of its own lane.

    `turns`: of a step's two micro-batches, which meet in groups of their own (`two_batches`); None: there are none.
    """

    layout: ParallelLayout
    world: RankGroup
    lane: RankGroup
    turns: Turns | None = None

    def set_timeout(self, seconds: float) -> None:
        """Let meetings of the world and of the lane wait so long from now on; see `RankGroup`."""
        self.world.set_timeout(seconds)
        self.lane.set_timeout(seconds)

    @property
    def rank(self) -> int:
        """This process's rank in the world."""
        return self.world.rank

    @property
    def lane_number(self) -> int:
        """The lane that it is in."""
        return self.layout.lane(self.world.rank)


ALONE = Ranks(ParallelLayout(), OneRank(), OneRank())
"""A model that one process computes."""


def join_ranks(
    layout: ParallelLayout, *, rank: int = -1, init_method: str = "env://", device: str = "cpu", timeout_s: float = 30.0
) -> Ranks:
    """Meet the other ranks of `layout` and return where this one stands; `ALONE` for a layout of one.

    Once a process: torch.distributed keeps its group for the whole of it. Bytes and tensors on the CPU travel by gloo,
    tensors on GPUs by NCCL, each process's on its current device.

    Args:
        layout: the model's.
        rank: this process's; -1: what torchrun set, RANK.
        init_method: torch's, where ranks find one another: "tcp://host:port" of rank 0, or "env://", what torchrun set.
        device: "cpu" or "cuda".
        timeout_s: how long a meeting, this first one too, waits for a rank.

    Raises:
        StartupError: BAD_RANKS, torchrun started another number of processes.
        UnavailableError: RANK_LOST, not all came.
    """
    if layout.size == 1:
        return ALONE
    # A process alone does without torch.distributed.
    from headrace_core.ranks.torch_group import join

    world = join(layout.size, rank=rank, init_method=init_method, device=device, timeout_s=timeout_s)
    return ranks_of(layout, world)


def ranks_of(layout: ParallelLayout, world: RankGroup) -> Ranks:
    """Return where this rank of `world` stands in `layout`, which has as many ranks; all of them call it."""
    assert layout.size == world.size, (layout, world.size)
    return Ranks(layout, world, world.part([layout.lane_ranks(lane) for lane in range(layout.num_lanes)]))
