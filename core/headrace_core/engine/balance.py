"""Keep the experts of a group balanced while it serves: rank 0's part.

    WATCHING ──the loss would fall by enough──► MOVING, a layer after another ──all moved──► WATCHING
                                                     └──a rank could not: the rest stays, next try later──► WATCHING

Every `REPORT_S`, or period if that is shorter, all ranks say what they counted. Of the last `WINDOW` such reports in
which there was work, once in `period_s`, a thread decides (`expert_moves`); nothing is decided where so few tokens came
that chance is what shows. All of it is said between two steps, as everything is that a leader says.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from headrace_core.engine.group_messages import Message, Move, Report, Settle
from headrace_core.engine.rank_experts import Counted, RankExperts, Settled
from headrace_core.expert_moves import (
    LEAST_GAIN,
    LEAST_TOKENS,
    Decision,
    Network,
    Slots,
    decide,
    is_enough,
    loss_of_ranks,
    rank_loads,
)
from headrace_core.ranks.group import RankGroup

log = logging.getLogger(__name__)

REPORT_S = 5.0
WINDOW = 12
"""Reports that a decision looks back on."""
_SETTLE_S = 0.02
"""Between two questions whether all are ready: asking costs a meeting."""
_MOST_WAITED = 16
"""Periods to wait at most after a move that failed; twice as many after each failure."""

T = TypeVar("T")


class Meet(Protocol):
    """Tells every rank a message and does rank 0's part of it; see `Leader.meet`."""

    def __call__(self, message: Message, own: Callable[[], T]) -> T:
        """Return what `own` does.

        Raises:
            FatalStepError: the group is over.
        """
        ...


@dataclass(frozen=True, slots=True)
class Rule:
    """When experts move. `period_s` None: they stay."""

    period_s: float | None = None
    least_gain: float = LEAST_GAIN
    least_tokens: float = LEAST_TOKENS
    network: Network = field(default_factory=Network)


@dataclass(frozen=True, slots=True)
class StepParts:
    """Where a rank's time in steps went, seconds: computing, meeting, waiting for ranks that still compute.

    The rank that others wait for waits least: what it spends in meetings is what meetings take.
    """

    compute: float
    communication: float
    waiting: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What a report says: tokens of each rank by layer over the window, the loss they come to, and steps since.

    `num_slots` of a layer, over all ranks.
    """

    rank_tokens: Mapping[int, Sequence[float]]
    loss: float
    parts: Sequence[StepParts]
    num_slots: int


@dataclass(frozen=True, slots=True)
class Moved:
    """A rebalance that is over: of how many layers, experts and bytes; `problem`: why the rest stayed."""

    num_layers: int
    num_experts: int
    num_bytes: int
    seconds: float
    problem: str | None = None


class Balance:
    """See the module. Engine thread only; `on_news` is called there."""

    def __init__(
        self,
        ranks: RankGroup,
        own: RankExperts,
        rule: Rule,
        *,
        on_news: Callable[[Seen | Moved], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: `own` are rank 0's experts; `clock` gives seconds."""
        self._ranks = ranks
        self._own = own
        self._rule = rule
        self._report_s = min(REPORT_S, rule.period_s or REPORT_S)
        self._on_news = on_news
        self._clock = clock
        self._window: deque[torch.Tensor] = deque(maxlen=WINDOW)
        self._reported_s = self._decided_s = self._asked_s = clock()
        self._waited = 1
        self._deciding: _Deciding | None = None
        self._moving: _Moving | None = None

    def turn(self, meet: Meet) -> None:
        """Say what is to be said between two steps, if anything is.

        Raises:
            FatalStepError: the group is over.
        """
        now = self._clock()
        if now - self._reported_s >= self._report_s:
            self._reported_s = now
            self._report(meet)
        if self._moving is not None:
            if not self._own.is_loading and now - self._asked_s >= _SETTLE_S:
                self._asked_s = now
                self._settle(meet, self._moving)
        elif self._deciding is not None:
            if self._deciding.is_over:
                self._begin(meet, self._deciding)
        elif self._rule.period_s is not None and now - self._decided_s >= self._rule.period_s * self._waited:
            self._decide(now)

    def close(self) -> None:
        """Give up what is under way."""
        self._own.close()

    def _report(self, meet: Meet) -> None:
        own = self._own
        counted = [own.counted(each) for each in meet(Report(), lambda: self._ranks.gather_bytes(own.report()))]
        tokens = sum((each.tokens for each in counted if len(each.tokens)), torch.zeros((), dtype=torch.int64))
        if tokens.any():
            self._window.append(tokens)
        loads = self._loads()
        of_ranks = {layer: rank_loads(of_layer, own.slots[layer]) for layer, of_layer in loads.items()}
        num_slots = sum(map(len, next(iter(own.slots.values()))))
        self._on_news(Seen(of_ranks, loss_of_ranks(of_ranks.values()), _parts(counted), num_slots))

    def _loads(self) -> dict[int, list[float]]:
        """Return what each expert got, by layer, over the window."""
        if not self._window:
            return {}
        total = torch.stack(list(self._window)).sum(0).tolist()
        return dict(zip(self._own.slots, total, strict=True))

    def _decide(self, now: float) -> None:
        loads = self._loads()
        if is_enough(loads, self._rule.least_tokens):
            self._decided_s = now
            self._deciding = _Deciding(loads, dict(self._own.slots), self._rule)

    def _begin(self, meet: Meet, deciding: _Deciding) -> None:
        self._deciding = None
        decision = deciding.decision
        if decision is None:
            self._end(Moved(0, 0, 0, 0.0, deciding.problem))
        elif decision.layers:
            about = {"layers": len(decision.layers), "loss": decision.loss_now, "loss_then": decision.loss_then}
            log.info("experts move", extra=about)
            self._moving = _Moving(decision, self._clock())
            self._next(meet, self._moving)

    def _next(self, meet: Meet, moving: _Moving) -> None:
        move = Move(*moving.left.pop(0))
        meet(move, lambda: self._own.start(move))

    def _settle(self, meet: Meet, moving: _Moving) -> None:
        settled = meet(Settle(), lambda: self._own.settle(self._ranks))
        if settled is None:
            return
        if settled.problem is None:
            moving.add(settled)
            if moving.left:
                self._next(meet, moving)
                return
        self._moving = None
        seconds = self._clock() - moving.began_s
        self._end(Moved(moving.num_layers, moving.num_experts, moving.num_bytes, seconds, settled.problem))

    def _end(self, moved: Moved) -> None:
        self._waited = 1 if moved.problem is None else min(2 * self._waited, _MOST_WAITED)
        about = {"layers": moved.num_layers, "experts": moved.num_experts, "bytes": moved.num_bytes}
        if moved.problem:
            log.error("experts stay where they were", extra={**about, "problem": moved.problem})
        else:
            log.info("experts moved", extra={**about, "seconds": moved.seconds})
        self._on_news(moved)


class _Moving:
    """A rebalance under way."""

    def __init__(self, decision: Decision, began_s: float) -> None:
        self.left: list[tuple[int, Slots]] = list(decision.layers.items())
        self.began_s = began_s
        self.num_layers = self.num_experts = self.num_bytes = 0

    def add(self, settled: Settled) -> None:
        self.num_layers += 1
        self.num_experts += settled.num_experts
        self.num_bytes += settled.num_bytes


class _Deciding:
    """A decision that a thread makes: with many experts it takes longer than a step. `problem`: why there is none."""

    def __init__(self, loads: Mapping[int, Sequence[float]], slots: Mapping[int, Slots], rule: Rule) -> None:
        self.decision: Decision | None = None
        self.problem = ""

        def run() -> None:
            try:
                self.decision = decide(loads, slots, rule.network, least_gain=rule.least_gain)
            except Exception as error:  # noqa: BLE001 - the boundary: experts stay, and what is served goes on
                self.problem = f"deciding: {type(error).__name__}: {error}"

        self._thread = threading.Thread(target=run, name="placing", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()


def _parts(counted: Sequence[Counted]) -> list[StepParts]:
    """Return each rank's, of those steps that all counted."""
    if not all(each.num_steps for each in counted):
        return []
    least = min(each.meeting_s for each in counted)
    return [StepParts(each.seconds - each.meeting_s, least, each.meeting_s - least) for each in counted]
