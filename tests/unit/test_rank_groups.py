"""A group of ranks: what the leader tells, what followers make of it, and that whatever goes wrong on one ends all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from headrace_core.batch.executor_book import ExecutorBook
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import Chunk, FatalStepError, OnLayer, SamplingRow, StepPlan
from headrace_core.batch.step_diff import BookDisagreesError, StepDiff
from headrace_core.engine import executor
from headrace_core.engine import group_messages as messages
from headrace_core.engine import leader as leading
from headrace_core.engine.executor import Executor
from headrace_core.engine.follower import Follower
from headrace_core.engine.halves import Halves
from headrace_core.engine.leader import GroupModel, Leader
from headrace_core.engine.rank_pages import RankPages
from headrace_core.errors import ProtocolError
from headrace_core.kv.layout import KvLayout
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.op_timer import OFF, OpTimer
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.page_share import PageShare
from headrace_core.request import SamplingParams
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.rank_threads import OnThread, RankThreads, ThreadRank
from headrace_decode.events import Output, Preempted
from headrace_decode.scheduler import DecodeScheduler
from headrace_decode.speculation import NO_DRAFTS, Drafting, Speculation
from torch import Tensor

PAGE_SIZE = 4
LIMITS = ModelLimits(vocab_size=97, max_context_tokens=64, eos_token_ids=(0,))


class SharedModel(FakeModel):
    """One rank's: its forward pass meets the other ranks, and is wrong if they compute something else."""

    def __init__(self, rank: ThreadRank) -> None:
        super().__init__(vocab_size=LIMITS.vocab_size)
        self._rank = rank

    def forward(
        self, chunks: Sequence[Chunk], cache: KvCache, timer: OpTimer = OFF, on_layer: OnLayer | None = None
    ) -> Tensor:
        logits = super().forward(chunks, cache, timer, on_layer)
        about = torch.tensor([float(chunk.start * 1000 + sum(chunk.token_ids)) for chunk in chunks])
        assert torch.equal(self._rank.all_sum(about), about * self._rank.size), "the ranks compute different chunks"
        return logits


class Group:
    """A scheduler, a leader and followers, whose models are fakes, over pools of the same size."""

    def __init__(
        self,
        *,
        size: int = 3,
        num_pages: int = 24,
        now: Callable[[], float] = lambda: 0.0,
        speculation: Speculation = NO_DRAFTS,
    ) -> None:
        self.threads = RankThreads(size)
        self.models = [SharedModel(rank) for rank in self.threads.ranks]
        self.loaded = [loaded_fake_model(num_pages=num_pages, page_size=PAGE_SIZE, model=m) for m in self.models]
        self.caches = [loaded.cache for loaded in self.loaded]
        self.scheduler = DecodeScheduler(
            PageAllocator(num_pages, PAGE_SIZE),
            LIMITS,
            max_step_tokens=16,
            max_step_sequences=6,
            max_waiting_sequences=99,
            speculation=speculation,
        )
        self.whole: KvLayout | None = None
        self.left = 0
        self.is_leaving = False
        model = GroupModel(self.models[0], self.threads.ranks[0])
        self.leader = Leader(
            self.threads.ranks[0],
            Executor(model, self.caches[0]).step,
            self.pages_of(0),
            self.scheduler.running_keys,
            on_leave=self.on_leave,
            clock=now,
        )
        self.halves = Halves(self.leader.step, lambda: None, clock=lambda: 0.0)
        self.followers = [
            OnThread(Follower(rank, model, cache, self.pages_of(rank.rank), is_leaving=lambda: self.is_leaving).run)
            for rank, model, cache in list(zip(self.threads.ranks, self.models, self.caches, strict=True))[1:]
        ]

    def pages_of(self, rank: int) -> RankPages:
        size = self.threads.size
        layout = ParallelLayout(size, num_expert_ranks=size)
        share = PageShare(self.whole or self.caches[rank].layout, layout, rank)
        return RankPages(self.caches[rank], share, self.threads.ranks[rank])

    def on_leave(self) -> None:
        self.left += 1

    def step(self) -> bool:
        plan = self.scheduler.plan(0.0)
        if plan is None:
            return False
        self.scheduler.apply(self.halves.run(plan), 0.0)
        return True

    def run(self) -> dict[int, list[int]]:
        """Compute all that there is; return the tokens of each sequence."""
        while self.step():
            pass
        tokens: dict[int, list[int]] = {}
        for event in self.scheduler.take_events():
            if isinstance(event, Output):
                tokens.setdefault(event.key, []).append(event.token.token_id)
        return tokens

    def close(self) -> None:
        self.leader.close()
        for follower in self.followers:
            follower.result()


def add(group: Group, keys: Sequence[int]) -> None:
    """Add sequences of which one is like another in nothing: prompt, its length, seed, temperature."""
    for key in keys:
        tokens = [(13 * key + 5 * i) % 90 + 1 for i in range(3 + key % 7)]
        params = SamplingParams(temperature=0.9 if key % 2 else 0.0, seed=key, max_tokens=12)
        group.scheduler.add(key, SequenceSpec(f"r{key}", 1, 0, tokens, len(tokens), params), 0.0)


def alone(keys: Sequence[int]) -> dict[int, list[int]]:
    group = Group(size=1)
    add(group, keys)
    return group.run()


def test_followers_compute_what_the_leader_plans_and_keep_the_same_pages():
    group = Group(num_pages=9)  # too few for all: some are pre-empted
    add(group, range(5))
    while group.step():
        pass
    events = group.scheduler.take_events()
    assert any(isinstance(event, Preempted) for event in events)
    tokens: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, Output):
            tokens.setdefault(event.key, []).append(event.token.token_id)
    group.close()
    assert tokens == alone(range(5))
    for cache in group.caches[1:]:
        for mine, leaders in zip(cache.layers, group.caches[0].layers, strict=True):
            assert torch.equal(mine.nan_to_num(-1), leaders.nan_to_num(-1))


def test_nobody_but_who_samples_is_told_by_what():
    group = Group(size=2)
    add(group, [1])
    group.run()
    group.close()
    plans = [messages.decode(message) for message in group.threads.ranks[1].messages]
    assert all(not plan.diff.joins for plan in plans if isinstance(plan, messages.Plan))
    assert isinstance(plans[-1], messages.Stop)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_forward_pass_that_raises_on_any_rank_ends_the_group(failing: int):
    group = Group(size=2)
    add(group, [1, 2])
    assert group.step()
    group.models[failing].failure = ValueError("a kernel refuses")

    def end_with_the_process() -> None:
        group.followers[0]._thread.join()
        group.threads.end()

    watching = OnThread(end_with_the_process)
    with pytest.raises(FatalStepError, match="rank 0 of 2: computing a step failed") as told:
        group.step()
    group.threads.end()  # as this process would
    watching.result()
    assert ("a kernel refuses" in str(told.value)) == (failing == 0)
    # Where the leader failed, its follower may not be past hearing of the step.
    with pytest.raises(FatalStepError, match=r"rank 1 of 2: (its share of plan|hearing the leader) failed") as heard:
        group.followers[0].result()
    assert ("a kernel refuses" in str(heard.value)) == (failing == 1)


def test_followers_compute_what_was_drafted_and_then_what_was_drawn(monkeypatch: pytest.MonkeyPatch):
    """Every third guess is wrong; the others are right."""
    tokens = alone(range(5))

    def guess(_: Drafting, token_ids: Sequence[int], count: int) -> list[int]:
        key = next(k for k in range(5) if token_ids[0] == 13 * k % 90 + 1)
        coming = tokens[key][len(token_ids) - 3 - key % 7 :][:count]
        return [token + (len(token_ids) + i) % 3 // 2 for i, token in enumerate(coming)]

    monkeypatch.setattr(Drafting, "guess", guess)
    group = Group(num_pages=12, speculation=Speculation(3, 16))
    add(group, range(5))
    drafted = group.run()
    group.close()
    assert drafted == tokens
    assert group.models[0].num_steps == group.models[2].num_steps < 20
    for cache in group.caches[1:]:
        for mine, leaders in zip(cache.layers, group.caches[0].layers, strict=True):
            assert torch.equal(mine.nan_to_num(-1), leaders.nan_to_num(-1))


def test_sampling_that_raises_costs_one_sequence_its_life_and_followers_go_on(monkeypatch: pytest.MonkeyPatch):
    group, unlucky = Group(size=2), 7
    add(group, [1, 3, 5, unlucky])
    sample = executor.sample_chunks

    def raising(logits: Tensor, chunks: Sequence[Chunk], rows: Sequence[SamplingRow], grammars: object) -> object:
        if any(row.params.seed == unlucky for row in rows):
            raise ZeroDivisionError("unlucky")
        return sample(logits, chunks, rows)

    monkeypatch.setattr(executor, "sample_chunks", raising)
    tokens = group.run()
    group.close()
    assert tokens == alone([1, 3, 5])


def test_a_follower_whose_book_is_another_ends_and_says_which(monkeypatch: pytest.MonkeyPatch):
    group = Group(size=2)
    add(group, [1])
    original = ExecutorBook.plan

    def astray(book: ExecutorBook, diff: StepDiff) -> StepPlan:
        if book._name == "of rank 1" and book._book.number == 2:
            book._book.digest ^= 1
        return original(book, diff)

    monkeypatch.setattr(ExecutorBook, "plan", astray)
    OnThread(lambda: (group.followers[0]._thread.join(), group.threads.end()))
    with pytest.raises(FatalStepError, match="rank 0 of 2"):
        group.run()
    with pytest.raises(BookDisagreesError, match="executor of rank 1 is before step 3"):
        group.followers[0].result()


def test_pages_that_landed_at_the_leader_are_every_ranks():
    group = Group()
    pattern = bytes(range(7))
    for layer in (0, 1):
        for page_id in (3, 5):
            page = group.caches[0].page_bytes(layer, page_id)
            page[:] = (pattern * len(page))[layer + page_id : layer + page_id + len(page)]
    group.leader.tell_pages(group.caches[0], [3, 5], range(1, 2))
    group.close()
    for cache in group.caches[1:]:
        for page_id in (3, 5):
            assert bytes(cache.page_bytes(1, page_id)) == bytes(group.caches[0].page_bytes(1, page_id))
            assert cache.layers[0][page_id].isnan().all(), "of layers that did not land nothing is told"


def test_a_beat_says_when_a_follower_was_told_to_leave():
    now = [0.0]
    group = Group(now=lambda: now[0])
    group.leader.beat()
    assert all(not rank.messages for rank in group.threads.ranks), "it is not time yet"
    for is_leaving, left in ((False, 0), (True, 1), (True, 1)):
        now[0] += leading.BEAT_S
        group.is_leaving = is_leaving
        group.leader.beat()
        assert group.left == left
    group.close()


def test_a_rank_that_is_gone_is_noticed_by_the_next_beat_and_nothing_is_said_any_more():
    now = [0.0]
    group = Group(size=2, now=lambda: now[0])
    now[0] = leading.BEAT_S
    group.threads.end()
    with pytest.raises(FatalStepError, match=r"rank 0 of 2: telling failed.*another rank is gone"):
        group.leader.beat()
    group.leader.close()
    with pytest.raises(FatalStepError, match="rank 1 of 2: hearing the leader failed"):
        group.followers[0].result()


@pytest.mark.parametrize("message", [b"", b"\x2a", b"\x06\x00", b"\x06" + bytes(12), b"\x01\x05\0\0\0", b"\x02\x00"])
def test_what_is_no_message_is_refused(message: bytes):
    with pytest.raises(ProtocolError):
        messages.decode(message)
