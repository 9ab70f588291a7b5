"""A group of ranks that are threads of this process: for tests of what leaders and followers say to each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from headrace_core.errors import UnavailableError
from headrace_core.ranks.group import Coming, Here, RankGroup, check_counts
from headrace_core.testing.async_test import WAIT_S

T = TypeVar("T")


class RankThreads:
    """`size` ranks of one group; one that fails, or does not come in time, is every rank's error."""

    def __init__(self, size: int, *, timeout_s: float = WAIT_S) -> None:
        self._barrier = threading.Barrier(size, timeout=timeout_s)
        self._given: list[Any] = [None] * size
        self.size = size
        self.ranks = [ThreadRank(self, rank) for rank in range(size)]

    def end(self) -> None:
        """Let every rank that waits, or will, fail: as when one is killed."""
        self._barrier.abort()

    def meet(self, rank: int, value: Any) -> list[Any]:
        """Return what every rank gave, when all did."""
        self._given[rank] = value
        try:
            self._barrier.wait()
            given = list(self._given)
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise UnavailableError("RANK_LOST", f"rank {rank}: another rank is gone") from None
        return given


class ThreadRank:
    """One of them; see `RankGroup`. `messages` are those that rank 0 told all."""

    def __init__(self, group: RankThreads, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.size = group.size
        self.sent_bytes = 0
        self.meeting_s = 0.0
        self.messages: list[bytes] = []

    def all_sum(self, part: Tensor, onto: Tensor | None = None) -> Tensor:
        """See `RankGroup`."""
        total = self.all_gather(part).sum(0)
        return total if onto is None else onto + total

    def all_gather(self, x: Tensor) -> Tensor:
        """See `RankGroup`."""
        return torch.stack(self._meet("gather", x.clone()))

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """See `RankGroup`."""
        check_counts(rows, send, receive, self.size)
        given = self._meet("exchange", rows.clone().split(list(send)))
        return torch.cat([parts[self.rank] for parts in given])

    def begin_exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Coming:
        """See `RankGroup`; waits at once."""
        return Here(self.exchange(rows, send, receive))

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """See `RankGroup`."""
        assert (data is not None) == (self.rank == 0), "rank 0 tells, the others hear"
        told = self._meet("broadcast", data)[0]
        assert told is not None
        self.messages.append(told)
        return told

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """See `RankGroup`."""
        return self._meet("gather bytes", data)

    def part(self, parts: Sequence[Sequence[int]], on_wait: Callable[[], None] | None = None) -> RankGroup:
        """See `RankGroup`."""
        raise NotImplementedError

    def set_timeout(self, seconds: float) -> None:
        """See `RankGroup`."""

    def close(self) -> None:
        """See `RankGroup`."""

    def _meet(self, what: str, value: T) -> list[T]:
        given = self._group.meet(self.rank, (what, value))
        assert {name for name, _ in given} == {what}, f"the ranks do different things: {given}"
        return [value for _, value in given]


class OnThread(Generic[T]):
    """A function that runs on a thread of its own."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._outcome: Sequence[T] = ()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> T:
        """Wait for it; raise what it raised."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), f"it did not end within {WAIT_S} s"
        if self.error is not None:
            raise self.error
        return self._outcome[0]

    def _run(self) -> None:
        try:
            self._outcome = (self._function(),)
        except BaseException as error:  # noqa: BLE001 - told by `result`
            self.error = error
