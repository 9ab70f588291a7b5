"""The ranks of a group that do not lead: each hears what the leader says and does its share of it.

    hear ──PLAN──► look it up in the book, forward ──► hear
      ├──PAGES──► take its part of them ──► hear
      ├──ASK──► give its part of them ──► hear
      ├──BEAT──► answer ──► hear
      ├──MOVE, SETTLE, REPORT──► its experts' part (`rank_experts`) ──► hear
      └──STOP──► over

A follower that can't do its share, or whose book is another than the plan was made for, ends, and its group with it:
what the others wait for never comes (`leader`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from headrace_core.batch.executor_book import ExecutorBook
from headrace_core.batch.step import FatalStepError
from headrace_core.batch.step_diff import StepDiff
from headrace_core.engine.executor import StepModel
from headrace_core.engine.group_messages import (
    Ask,
    Beat,
    Message,
    Move,
    Pages,
    Plan,
    Report,
    Settle,
    Stop,
    decode,
)
from headrace_core.engine.leader import group_over
from headrace_core.engine.rank_experts import RankExperts
from headrace_core.engine.rank_pages import RankPages
from headrace_core.model.kv_cache import KvCache
from headrace_core.ranks.group import RankGroup


class Follower:
    """See the module. One thread, until `run` returns or raises."""

    def __init__(
        self,
        ranks: RankGroup,
        model: StepModel,
        cache: KvCache,
        pages: RankPages,
        experts: RankExperts | None = None,
        *,
        is_leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        """Args: `is_leaving` is what the leader is told with each beat: whether this process was told to end."""
        self._ranks = ranks
        self._model = model
        self._cache = cache
        self._pages = pages
        self._experts = experts or RankExperts({}, None)
        self._is_leaving = is_leaving
        self._book = ExecutorBook(f"of rank {ranks.rank}", lane_pages=cache.num_pages)
        self._sampled: list[int] = []
        """The keys of the last plan's sampled rows."""

    def run(self) -> None:
        """Follow until the leader lets go.

        Raises:
            FatalStepError: the group is over.
        """
        what = "hearing the leader"
        try:
            with torch.inference_mode():
                while True:
                    what = "hearing the leader"
                    message = decode(self._ranks.broadcast_bytes(None))
                    if isinstance(message, Stop):
                        self._experts.close()
                        return
                    what = f"its share of {type(message).__name__.lower()}"
                    self._do(message)
        except FatalStepError:
            raise
        except Exception as error:
            raise group_over(self._ranks, what, error) from error

    def _do(self, message: Message) -> None:
        match message:
            case Plan(diff, sampled_ids):
                self._compute(diff, sampled_ids)
            case Pages():
                self._pages.take(message)
            case Ask():
                self._pages.give(message)
            case Beat():
                self._ranks.all_sum(torch.full((1,), float(self._is_leaving())))
            case Move():
                self._experts.start(message)
            case Settle():
                self._experts.settle(self._ranks)
            case Report():
                self._ranks.gather_bytes(self._experts.report())
            case Stop():
                pass

    def _compute(self, diff: StepDiff, sampled_ids: Sequence[int]) -> None:
        if sampled_ids:
            self._book.sampled({key: [token] for key, token in zip(self._sampled, sampled_ids, strict=True)})
        plan = self._book.plan(diff)
        self._sampled = [chunk.key for chunk in plan.chunks if chunk.is_sampled]
        self._cache.zero_pages(plan.forward.zero_page_ids)
        with self._experts.clock.step():
            self._model.forward(plan.forward.rows, self._cache)
        # The leader's are the group's.
        self._model.take_failures()
        self._model.take_expert_counts()
