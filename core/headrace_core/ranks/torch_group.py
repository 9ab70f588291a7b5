"""`RankGroup` over torch.distributed: gloo between CPUs, NCCL between GPUs.

Tensors travel as bytes, so every dtype does, and no backend adds: what it would add, and in which order, is its own
business. Sums are gathered, or, when they are large and the ranks more than two, cut into pieces that one rank each
adds: 2 · (R - 1) / R of a tensor are sent instead of R - 1 of it. Either way each value is added in the order of ranks.
"""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout  # pyright: ignore[reportPrivateUsage] - the only way

from headrace_core.errors import StartupError, UnavailableError
from headrace_core.ranks.group import Coming, OneRank, RankGroup, check_counts, ordered_sum
from headrace_core.ranks.meeting import meeting_store
from headrace_core.ranks.traffic import LARGE_SUM_BYTES

_FRAME_BYTES = 8192
"""Of a broadcast's first meeting: a length, and as much of the data as fits."""
_LENGTH = struct.Struct("<Q")
# torch 2.13's name, and that of the versions before.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_gather_into: Callable[..., Any] = getattr(dist, _GATHER)
_all_to_all: Callable[..., Any] = dist.all_to_all_single


class TorchGroup:
    """See `RankGroup`."""

    def __init__(
        self, ranks: Sequence[int], group: dist.ProcessGroup, on_wait: Callable[[], None] | None = None
    ) -> None:
        """Take the process group of the world's `ranks`, in their order; `on_wait` as of `RankGroup.part`."""
        self.rank = dist.get_rank(group)
        self.size = len(ranks)
        self.sent_bytes = 0
        self.meeting_s = 0.0
        self._ranks = list(ranks)
        self._group = group
        self.on_wait = on_wait

    def all_sum(self, part: Tensor, onto: Tensor | None = None) -> Tensor:
        """See `RankGroup`."""
        if self.size == 2 or part.numel() * part.element_size() < LARGE_SUM_BYTES:
            return ordered_sum(self.all_gather(part), onto).view(part.shape)
        width = -(-part.numel() // self.size)
        pieces = _cut(part, width, self.size)
        received = self.exchange(pieces, [1] * self.size, [1] * self.size)
        own = None if onto is None else _cut(onto, width, self.size)[self.rank]
        return self.all_gather(ordered_sum(received, own)).flatten()[: part.numel()].view(part.shape)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `RankGroup`."""
        out = x.new_empty((self.size, *x.shape))
        if not x.numel():
            return out
        self.sent_bytes += (self.size - 1) * x.numel() * x.element_size()
        into, given = _bytes(out).flatten(), _bytes(x.contiguous()).flatten()
        return self._begin(
            "gather", out, given, lambda: _gather_into(into, given, group=self._group, async_op=True)
        ).wait()

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """See `RankGroup`."""
        return self.begin_exchange(rows, send, receive).wait()

    def begin_exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Coming:
        """See `RankGroup`."""
        check_counts(rows, send, receive, self.size)
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
        self.sent_bytes += (sum(send) - send[self.rank]) * row_bytes
        into, given = _rows_of_bytes(out), _rows_of_bytes(rows.contiguous())
        counts = list(receive), list(send)
        return self._begin(
            "exchange", out, given, lambda: _all_to_all(into, given, *counts, self._group, async_op=True)
        )

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """See `RankGroup`."""
        frame = torch.zeros(_FRAME_BYTES, dtype=torch.uint8)
        room = _FRAME_BYTES - _LENGTH.size
        if self.rank == 0:
            assert data is not None, "rank 0 is the one that has them"
            first = _LENGTH.pack(len(data)) + data[:room]
            frame[: len(first)] = torch.frombuffer(bytearray(first), dtype=torch.uint8)
        self._broadcast(frame)
        held = frame.numpy().tobytes()
        length = _LENGTH.unpack_from(held)[0]
        if length <= room:
            return held[_LENGTH.size : _LENGTH.size + length]
        rest = torch.empty(length - room, dtype=torch.uint8)
        if data is not None and self.rank == 0:
            rest = torch.frombuffer(bytearray(data[room:]), dtype=torch.uint8)
        self._broadcast(rest)
        return held[_LENGTH.size :] + rest.numpy().tobytes()

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """See `RankGroup`."""
        lengths: list[int] = self.all_gather(torch.tensor([len(data)])).flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = self.all_gather(padded)
        return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

    def part(self, parts: Sequence[Sequence[int]], on_wait: Callable[[], None] | None = None) -> RankGroup:
        """See `RankGroup`."""
        assert sorted(rank for part in parts for rank in part) == list(range(self.size)), parts
        own: RankGroup | None = None
        for part in parts:
            # All ranks make all groups, in the same order: torch's rule.
            ranks = [self._ranks[rank] for rank in part]
            with self.meeting("part"):
                group = dist.new_group(ranks)
            if self.rank in part:
                assert isinstance(group, dist.ProcessGroup)
                own = OneRank() if len(part) == 1 else TorchGroup(ranks, group, on_wait)
        assert own is not None
        return own

    def set_timeout(self, seconds: float) -> None:
        """See `RankGroup`."""
        _set_pg_timeout(timedelta(seconds=seconds), self._group)

    def close(self) -> None:
        """See `RankGroup`; of every group of the process."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _begin(self, what: str, out: Tensor, given: Tensor, begin: Callable[[], Any]) -> _Begun:
        with self.meeting(what):
            work = begin()
        return _Begun(self, what, work, out, given)

    def _broadcast(self, data: Tensor) -> None:
        if self.rank == 0:
            self.sent_bytes += (self.size - 1) * data.numel()
        with self.meeting("broadcast"):
            dist.broadcast(data, self._ranks[0], group=self._group)

    @contextmanager
    def meeting(self, what: str) -> Generator[None]:
        """Let what torch raises be RANK_LOST; count the time."""
        began = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            raise _lost(f"rank {self.rank} of {self.size}: {what}", error) from error
        self.meeting_s += time.perf_counter() - began


class _Begun:
    """A meeting that was begun: what it is given and what comes stay where they are until it is over."""

    def __init__(self, group: TorchGroup, what: str, work: Any, out: Tensor, given: Tensor) -> None:
        self._group, self._what, self._work = group, what, work
        self._out, self._given = out, given

    def wait(self) -> Tensor:
        """See `Coming`."""
        if self._group.on_wait is not None:
            self._group.on_wait()
        with self._group.meeting(self._what):
            self._work.wait()
        return self._out


def join(size: int, *, rank: int, init_method: str, device: str, timeout_s: float) -> TorchGroup:
    """Return the group of all `size` processes; see `group.join_ranks`."""
    if init_method == "env://":
        started = os.environ.get("WORLD_SIZE", "")
        if started != str(size):
            raise StartupError("BAD_RANKS", f"the layout has {size} ranks but WORLD_SIZE is {started or 'not set'}")
        rank = int(os.environ.get("RANK", "-1")) if rank < 0 else rank
    if not 0 <= rank < size:
        raise StartupError("BAD_RANKS", f"rank {rank} is none of {size}")
    timeout = timedelta(seconds=timeout_s)
    try:
        store = meeting_store(rank, size, timeout) if init_method == "env://" else None
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            init_method=None if store else init_method,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    except RuntimeError as error:
        raise _lost(f"rank {rank} of {size}: joining at {init_method}", error) from error
    assert dist.group.WORLD is not None
    return TorchGroup(range(size), dist.group.WORLD)


def _lost(what: str, error: RuntimeError) -> UnavailableError:
    first_line = str(error).strip().split("\n", 1)[0]
    return UnavailableError("RANK_LOST", f"{what}: another rank is gone, or did not come in time: {first_line}")


def _cut(x: Tensor, width: int, count: int) -> Tensor:
    """Return the values of `x` as [count, width], zeros behind the last."""
    flat = x.reshape(-1)
    if len(flat) < count * width:
        flat = torch.cat((flat, flat.new_zeros(count * width - len(flat))))
    return flat.view(count, width)


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.ndim else x[None].view(torch.uint8)


def _rows_of_bytes(rows: Tensor) -> Tensor:
    """Return `rows` [n, ...], contiguous, as [n, bytes of a row]."""
    return rows.view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)
