"""One rank's whole experts, as the group sees them: it counts, makes a layer's next ones ready, and switches with all.

    RESTING ──MOVE──► LOADING, on a thread of its own ──► READY or FAILED
       ▲                                                        │
       └────────── SETTLE, once no rank is LOADING: ────────────┘
             all READY: every rank switches; else none does

A SETTLE is a meeting in which every rank learns how far every other is, so all decide the same; it lies between two
steps, which are in the same order on all. That is the one moment at which who computes an expert changes.
"""

from __future__ import annotations

import contextvars
import json
import struct
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headrace_core.engine.group_messages import Move
from headrace_core.errors import HeadraceError
from headrace_core.expert_moves import Slots
from headrace_core.model.expert_store import GivenUpError, Prepared
from headrace_core.ranks.group import RankGroup

_CLOCK = struct.Struct("<Qdd")
_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Settled:
    """How a move ended: `problem` on the rank of which it says, or None; what all ranks read, in how long at most."""

    problem: str | None
    num_experts: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Counted:
    """What one rank counted: steps, their seconds, those of them in meetings; tokens by layer and expert.

    `tokens` [layers, experts] int64; of one rank of each lane, [0] of the others.
    """

    num_steps: int
    seconds: float
    meeting_s: float
    tokens: Tensor


class Store(Protocol):
    """See `ExpertStore`."""

    slots: dict[int, Slots]

    def prepare(self, layer: int, after: Slots, is_wanted: Callable[[], bool]) -> Prepared:
        """See `ExpertStore`."""
        ...

    def switch(self, layer: int, after: Slots) -> None:
        """See `ExpertStore`."""
        ...


class StepClock:
    """How long steps take, and how much of that is in meetings of `groups`; none: it is not known, as on GPUs."""

    def __init__(self, groups: Sequence[RankGroup]) -> None:
        self._groups = list({id(group): group for group in groups}.values())
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self.num_steps, self.seconds, self.meeting_s = 0, 0.0, 0.0

    @contextmanager
    def step(self) -> Generator[None]:
        """Count what is computed in it; what raises is not."""
        began, met = time.perf_counter(), self._met()
        yield
        if self._groups:
            self.num_steps += 1
            self.seconds += time.perf_counter() - began
            self.meeting_s += self._met() - met

    def _met(self) -> float:
        return sum(group.meeting_s for group in self._groups)


class RankExperts:
    """See the module. Engine thread only."""

    def __init__(
        self,
        slots: Mapping[int, Slots],
        take_counts: Callable[[], Tensor] | None,
        *,
        store: Store | None = None,
        clock: StepClock | None = None,
    ) -> None:
        """Know where experts are, or, with `store`, move them.

        Args:
            slots: of each layer, when ranks start.
            take_counts: gives tokens by layer and expert since it was last asked; None: another rank of the lane does.
            store: None: experts stay.
            clock: None: of no group.
        """
        self.clock = clock or StepClock([])
        self._slots = slots
        self._take_counts = take_counts
        self._store = store
        self._move: Move | None = None
        self._outcome: Settled | None = None
        self._thread: threading.Thread | None = None
        self._is_over = False

    @property
    def slots(self) -> Mapping[int, Slots]:
        """Where experts are, by layer."""
        return self._store.slots if self._store else self._slots

    @property
    def is_loading(self) -> bool:
        """Whether this rank is not ready to settle."""
        return self._move is not None and self._outcome is None

    def start(self, move: Move) -> None:
        """Make ready what this rank is to hold of a layer, while steps go on."""
        assert self._store is not None, "a group is told to move only if it can"
        assert self._move is None, "one layer at a time"
        self._move, self._outcome = move, None
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=lambda: run(self._load, move), name="experts", daemon=True)
        self._thread.start()

    def settle(self, ranks: RankGroup) -> Settled | None:
        """Meet, and switch if all are ready; None: some are not yet, and nothing is changed anywhere.

        Raises:
            UnavailableError: RANK_LOST.
        """
        own = self._outcome
        said = [json.loads(each) for each in ranks.gather_bytes(json.dumps(own and _plain(own)).encode())]
        if not all(said):
            return None
        assert self._store is not None
        assert self._move is not None
        problems = [f"rank {rank}: {each['problem']}" for rank, each in enumerate(said) if each["problem"]]
        if not problems:
            self._store.switch(self._move.layer, self._move.slots)
        self._move = self._outcome = None
        return Settled(
            "; ".join(problems) or None,
            sum(each["num_experts"] for each in said),
            sum(each["num_bytes"] for each in said),
            max(each["seconds"] for each in said),
        )

    def report(self) -> bytes:
        """Return what was counted since the last call; `counted` reads it."""
        clock, tokens = self.clock, self._take_counts() if self._take_counts else torch.zeros(0, dtype=torch.int64)
        head = _CLOCK.pack(clock.num_steps, clock.seconds, clock.meeting_s)
        clock.clear()
        return head + tokens.contiguous().numpy().tobytes()

    def counted(self, report: bytes) -> Counted:
        """Return what a rank's `report` says."""
        num_steps, seconds, meeting_s = _CLOCK.unpack_from(report)
        tokens = torch.zeros(0, dtype=torch.int64)
        if len(report) > _CLOCK.size:
            tokens = torch.frombuffer(bytearray(report[_CLOCK.size :]), dtype=torch.int64).view(len(self.slots), -1)
        return Counted(num_steps, seconds, meeting_s, tokens)

    def close(self) -> None:
        """Give up what is being loaded."""
        self._is_over = True
        if self._thread:
            self._thread.join(_STOP_S)

    def _load(self, move: Move) -> None:
        assert self._store is not None
        began = time.perf_counter()
        try:
            read = self._store.prepare(move.layer, move.slots, lambda: not self._is_over)
            self._outcome = Settled(None, read.num_experts, read.num_bytes, time.perf_counter() - began)
        except GivenUpError:
            return
        except HeadraceError as error:
            self._outcome = Settled(f"{error.reason}: {error}")
        except Exception as error:  # noqa: BLE001 - the boundary: experts stay, whatever kept them from being loaded
            self._outcome = Settled(f"{type(error).__name__}: {error}")


def _plain(settled: Settled) -> dict[str, object]:
    return {
        "problem": settled.problem,
        "num_experts": settled.num_experts,
        "num_bytes": settled.num_bytes,
        "seconds": settled.seconds,
    }
