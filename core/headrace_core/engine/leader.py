"""Rank 0 of a group: it plans, samples and speaks with everybody; the other ranks compute what it tells them.

A step is told before it is computed, and which tokens came of it with the next one. Pages that came from elsewhere are
told as they are here, before a step that may read them. All of that is said on the engine thread, between two steps or
at the beginning of one, so every rank does the same in the same order; that is all the order there is.

**What ends a group.** Once a step is told, an exception in its forward pass is fatal, on whichever rank: the others
wait in the middle of a sum that will never come, and nobody can tell them. What fails before (a message that can't be
made) or after (sampling, where ranks are level again) ends no more than the sequence, by halves, as in a process alone.

Every `BEAT_S` everybody answers, idle or not: a rank that does not, within the group's time, is dead or hangs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from headrace_core.batch.step import Chunk, FatalStepError, OnLayer, OnStop, StepPlan, StepResult
from headrace_core.batch.step_diff import Differ
from headrace_core.engine.balance import Balance
from headrace_core.engine.executor import StepModel
from headrace_core.engine.group_messages import Ask, Beat, Message, Pages, Plan, Stop, encode
from headrace_core.engine.rank_experts import StepClock
from headrace_core.engine.rank_pages import RankPages
from headrace_core.errors import HeadraceError, UnavailableError
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.op_timer import OFF, OpTimer
from headrace_core.ranks.group import RankGroup
from headrace_core.request import PromptLogprobs
from headrace_core.transfer.memory import PageMemory

BEAT_S = 1.0
_STAND_IN = 0
"""A token for a row that failed: its sequence is over, so nobody looks at it."""

Step = Callable[[StepPlan, OnStop | None], StepResult]
T = TypeVar("T")


class Leader:
    """See the module. Engine thread only, and `close` after it ended.

    Everything that it says may raise `FatalStepError`: the group is over.
    """

    def __init__(
        self,
        ranks: RankGroup,
        step: Step,
        pages: RankPages,
        running_keys: Callable[[], Collection[int]],
        *,
        on_leave: Callable[[], None],
        balance: Balance | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Lead `ranks`, all of them followers.

        Args:
            ranks: the group.
            step: the executor's, of a `GroupModel`.
            pages: rank 0's part of them.
            running_keys: gives the keys of all sequences that may have rows.
            on_leave: called when a follower was told to leave; from the engine thread, once.
            balance: has its turn between steps; None: ranks hold no whole experts.
            clock: seconds.
        """
        self._ranks = ranks
        self._step = step
        self._pages = pages
        self._running_keys = running_keys
        self._on_leave: Callable[[], None] | None = on_leave
        self._balance = balance
        self._clock = clock
        self._differ = Differ()
        self._sampled_ids: Sequence[int] = ()
        self._beaten_s = clock()
        self._is_lost = False

    def step(self, plan: StepPlan, on_stop: OnStop | None = None) -> StepResult:
        """Run one plan on every rank; as `Executor.step`."""
        self.beat()
        diff = self._differ.diff(plan, self._running_keys())
        # Who samples knows by what; the others are not told.
        self._tell(Plan(replace(diff, joins=()), self._sampled_ids))
        self._sampled_ids = ()
        result = self._step(plan, on_stop)
        tokens = [result.tokens.get(chunk.key) for chunk in plan.chunks if chunk.is_sampled]
        self._sampled_ids = [row[0].token_id if row else _STAND_IN for row in tokens]
        return result

    def tell_pages(self, memory: PageMemory, page_ids: Sequence[int], layers: range) -> None:
        """Give every rank its part of what these layers of pages of `memory`, which are whole, hold by `page_bytes`."""
        if self._pages.is_others(page_ids):
            pages = Pages(layers.start, len(layers), page_ids)
            self._tell(pages)
            with self._together("giving out pages"):
                self._pages.give_out(pages, memory)

    def ask_pages(self, memory: PageMemory, page_ids: Sequence[int], layers: range) -> None:
        """Put these layers of pages together in `memory`, whole, from the parts of the ranks that have them."""
        ask = Ask(layers.start, len(layers), page_ids)
        self._tell(ask)
        with self._together("putting pages together"):
            self._pages.collect(ask, memory)

    def beat(self) -> None:
        """See that every rank lives, if that was not seen for `BEAT_S`; let who balances experts have its turn."""
        if self._balance is not None:
            self._balance.turn(self.meet)
        if self._clock() - self._beaten_s < BEAT_S:
            return
        self._tell(Beat())
        with self._together("answering"):
            num_leaving = float(self._ranks.all_sum(torch.zeros(1)))
        self._beaten_s = self._clock()
        if num_leaving and self._on_leave:
            self._on_leave()
            self._on_leave = None

    def meet(self, message: Message, own: Callable[[], T]) -> T:
        """Tell every rank `message`, do rank 0's part of it and return what that gives."""
        self._tell(message)
        with self._together(f"its share of {type(message).__name__.lower()}"):
            return own()

    def close(self) -> None:
        """Let the followers go; nothing if the group is over already."""
        if self._balance is not None:
            self._balance.close()
        if not self._is_lost:
            self._is_lost = True
            self._ranks.broadcast_bytes(encode(Stop()))

    def _tell(self, message: Message) -> None:
        encoded = encode(message)
        with self._together("telling"):
            self._ranks.broadcast_bytes(encoded)

    @contextmanager
    def _together(self, what: str) -> Generator[None]:
        try:
            yield
        except Exception as error:
            self._is_lost = True
            raise group_over(self._ranks, what, error) from error


class GroupModel:
    """A model whose forward pass is one of several ranks': that it raises is fatal."""

    def __init__(self, model: StepModel, ranks: RankGroup, clock: StepClock | None = None) -> None:
        """Args: `clock` is told how long forward passes take."""
        self._model = model
        self._ranks = ranks
        self._clock = clock or StepClock([])

    def forward(
        self, chunks: Sequence[Chunk], cache: KvCache, timer: OpTimer = OFF, on_layer: OnLayer | None = None
    ) -> Tensor:
        """See `StepModel`.

        Raises:
            FatalStepError: it raised here, or another rank is gone.
        """
        try:
            with self._clock.step():
                return self._model.forward(chunks, cache, timer, on_layer)
        except Exception as error:
            raise group_over(self._ranks, "computing a step", error) from error

    def take_failures(self) -> dict[int, HeadraceError]:
        """See `StepModel`."""
        return self._model.take_failures()

    def take_prompt_logprobs(self) -> dict[int, PromptLogprobs]:
        """See `StepModel`."""
        return self._model.take_prompt_logprobs()

    def take_expert_counts(self) -> dict[int, list[int]]:
        """See `StepModel`."""
        return self._model.take_expert_counts()


class RankLostError(FatalStepError, UnavailableError):
    """Another rank is gone, hangs or failed: what is wrong is in its log, not in this one's."""


def group_over(ranks: RankGroup, what: str, error: Exception) -> FatalStepError:
    """Return what ends a group, as a rank sees it: what it did, and what came of that.

    A `RankLostError` if `error` is another rank's fault, else one of which it is the cause.
    """
    where = f"rank {ranks.rank} of {ranks.size}: {what} failed"
    if isinstance(error, UnavailableError):
        text = f"{where}: {error}; the group ends, see the other ranks' logs and start it again"
        return RankLostError(error.reason, text)
    return FatalStepError(f"{where}, so the group ends: {type(error).__name__}: {error}")
