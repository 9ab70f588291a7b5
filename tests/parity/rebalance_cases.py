"""A group that serves while its experts move: what its ranks do, in a module of its own, which their processes import.

Rank 0 leads as in a worker: scheduler, leader, balance; the others follow. Nothing is timed: the last rank is not ready
before it has computed `_STEPS_MEANWHILE` more steps of the others' requests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from headrace_core.batch.scheduler import Load
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import Chunk, OnLayer
from headrace_core.engine.balance import Balance, Moved, Rule, Seen
from headrace_core.engine.executor import Executor
from headrace_core.engine.follower import Follower
from headrace_core.engine.leader import GroupModel, Leader
from headrace_core.engine.rank_experts import RankExperts, StepClock
from headrace_core.engine.rank_pages import RankPages
from headrace_core.errors import CheckpointError
from headrace_core.expert_moves import Slots
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.model.expert_store import ExpertStore, Prepared
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.load import load_model
from headrace_core.model.model import Model
from headrace_core.model.op_timer import OFF, OpTimer
from headrace_core.ranks.group import RankGroup, ranks_of
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.page_share import PageShare
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S
from headrace_core.worker.rank_group import rank_cache
from headrace_decode.events import Output
from headrace_decode.scheduler import DecodeScheduler
from torch import Tensor

_STEPS_MEANWHILE = 3
_PAGE_SIZE, _NUM_PAGES = 16, 96


class Served(NamedTuple):
    """What a rank saw: rank 0 each prompt's tokens; steps when moves began and layers switched; what it was told."""

    tokens: list[list[int]]
    begun: list[int]
    switched: list[int]
    moved: list[Moved]
    seen: list[Seen]
    slots: dict[int, Slots]


class CountedModel:
    """A rank's model that counts its steps."""

    def __init__(self, model: Model) -> None:
        self.num_steps = 0
        self.stepped = threading.Condition()
        self._model = model

    def forward(
        self, chunks: Sequence[Chunk], cache: KvCache, timer: OpTimer = OFF, on_layer: OnLayer | None = None
    ) -> Tensor:
        """See `StepModel`."""
        logits = self._model.forward(chunks, cache, timer, on_layer)
        with self.stepped:
            self.num_steps += 1
            self.stepped.notify_all()
        return logits

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)


class WatchedStore:
    """A rank's store; on the last rank one that is not ready before some steps more. `failing`: it never is."""

    def __init__(self, store: ExpertStore, model: CountedModel, *, is_held: bool, is_failing: bool) -> None:
        self.slots = store.slots
        self.begun: list[int] = []
        self.switched: list[int] = []
        self._store = store
        self._model = model
        self._is_held = is_held
        self._is_failing = is_failing

    def prepare(self, layer: int, after: Slots, is_wanted: Callable[[], bool]) -> Prepared:
        """See `ExpertStore`."""
        self.begun.append(self._model.num_steps)
        prepared = self._store.prepare(layer, after, is_wanted)
        if self._is_held:
            until = self.begun[-1] + _STEPS_MEANWHILE
            with self._model.stepped:
                while self._model.num_steps < until and is_wanted():
                    self._model.stepped.wait(0.05)
        if self._is_failing:
            raise CheckpointError("DAMAGED_FILE", "half of it is gone")
        return prepared

    def switch(self, layer: int, after: Slots) -> None:
        """See `ExpertStore`."""
        self.switched.append(self._model.num_steps)
        self._store.switch(layer, after)


def serve(
    world: RankGroup,
    folder: Path,
    attention: str,
    prompts: list[list[int]],
    num_tokens: int,
    failing: int | None = None,
) -> Served:
    """Answer the prompts again and again until experts have moved, or failed to, and once more then."""
    ranks = ranks_of(ParallelLayout.parse(attention, f"ep{world.size}"), world)
    loaded = load_model(folder, ranks=ranks, redundant_experts=world.size)
    assert loaded.store is not None
    model = CountedModel(loaded)
    is_last = world.rank == world.size - 1
    store = WatchedStore(loaded.store, model, is_held=is_last, is_failing=failing == world.rank)
    clock = StepClock([ranks.world, ranks.lane])
    take = loaded.take_expert_counts_since if ranks.layout.place(world.rank) == 0 else None
    own = RankExperts(store.slots, take, store=store, clock=clock)
    whole = loaded.config.kv_layout(_PAGE_SIZE, loaded.cache_dtype)
    cache = rank_cache(ranks, loaded.kv_layout(_PAGE_SIZE), whole, _NUM_PAGES // ranks.layout.num_lanes)
    pages = RankPages(cache, PageShare(whole, ranks.layout, world.rank), world)
    if world.rank:
        Follower(world, model, cache, pages, own).run()
        return Served([], store.begun, store.switched, [], [], dict(store.slots))
    news: list[Seen | Moved] = []
    # Any gain is worth it, and loads of few tokens decide: the sizes are those of a test.
    rule = Rule(period_s=0.01, least_gain=0.01, least_tokens=1)
    scheduler = DecodeScheduler(
        PageAllocator(_NUM_PAGES, _PAGE_SIZE, num_lanes=ranks.layout.num_lanes),
        ModelLimits(loaded.config.vocab_size, loaded.config.max_context_tokens, ()),
        max_step_tokens=32,
        max_step_sequences=8,
        max_waiting_sequences=99,
    )
    leader = Leader(
        world,
        Executor(GroupModel(model, world, clock), cache).step,
        pages,
        scheduler.running_keys,
        on_leave=lambda: None,
        balance=Balance(world, own, rule, on_news=news.append),
    )
    tokens = _answers(scheduler, leader, prompts, num_tokens, lambda: any(isinstance(each, Moved) for each in news))
    leader.close()
    return Served(
        tokens,
        store.begun,
        store.switched,
        [each for each in news if isinstance(each, Moved)],
        [each for each in news if isinstance(each, Seen)],
        dict(store.slots),
    )


def _answers(
    scheduler: DecodeScheduler, leader: Leader, prompts: list[list[int]], num_tokens: int, has_moved: Callable[[], bool]
) -> list[list[int]]:
    """Return all answers, in order; one round of the prompts more once experts have moved."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    answers: dict[int, list[int]] = {}
    deadline_s, rounds_left = time.monotonic() + WAIT_S * 4, 2
    while rounds_left:
        assert time.monotonic() < deadline_s, "experts do not move"
        rounds_left -= has_moved()
        for prompt in prompts:
            key = len(answers)
            answers[key] = []
            scheduler.add(key, SequenceSpec(f"r{key}", 1, 0, prompt, len(prompt), params), 0.0)
        while (plan := scheduler.plan(0.0)) is not None:
            scheduler.apply(leader.step(plan), 0.0)
            for event in scheduler.take_events():
                if isinstance(event, Output):
                    answers[event.key].append(event.token.token_id)
    assert scheduler.load().num_running == Load().num_running
    return list(answers.values())
