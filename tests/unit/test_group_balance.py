"""Rank 0 keeps experts balanced: when it decides, what all ranks do then, and what becomes of a rank that can't."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch
from headrace_core.config import DecodeSettings
from headrace_core.engine import balance as balancing
from headrace_core.engine.balance import Balance, Moved, Rule, Seen, StepParts
from headrace_core.engine.group_messages import Message, Move, Report, Settle, decode, encode
from headrace_core.engine.rank_experts import RankExperts, Store
from headrace_core.errors import CheckpointError, StartupError
from headrace_core.expert_moves import Slots
from headrace_core.expert_placement import in_order
from headrace_core.families.config_json import parse_config
from headrace_core.model.expert_store import GivenUpError, Prepared, num_slots, spare_bytes, with_replicas
from headrace_core.model.weights_dtype import AS_NUMBERS
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.rank_threads import OnThread, RankThreads, ThreadRank
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from headrace_core.worker.rank_group import _num_nodes, redundant_experts
from headrace_kernels.experts import empty_experts

T = TypeVar("T")
LAYERS = {1: in_order(4, 2, 2).ranks, 3: in_order(4, 2, 2).ranks}
SKEWED = [[90, 90, 10, 10], [10, 10, 90, 90]]


class FakeStore:
    """Records what it is asked; `ready` is waited for, `error` raised."""

    def __init__(self) -> None:
        self.slots: dict[int, Slots] = dict(LAYERS)
        self.ready = threading.Event()
        self.ready.set()
        self.error: Exception | None = None

    def prepare(self, layer: int, after: Slots, is_wanted: Callable[[], bool]) -> Prepared:
        while not self.ready.wait(0.01):
            if not is_wanted():
                raise GivenUpError
        if self.error:
            raise self.error
        return Prepared(2, 100)

    def switch(self, layer: int, after: Slots) -> None:
        self.slots[layer] = after


class Group:
    """Two ranks: rank 0 takes turns, the other does what it is told on a thread of its own."""

    def __init__(self, rule: Rule | None = None, counts: list[list[int]] | None = None) -> None:
        self.threads = RankThreads(2)
        self.now = 0.0
        self.counts = SKEWED if counts is None else counts
        self.stores = [FakeStore(), FakeStore()]
        # One lane: the second rank has the same tokens and counts none.
        self.experts = [
            RankExperts(store.slots, self.take if rank == 0 else None, store=store)
            for rank, store in enumerate(self.stores)
        ]
        self.news: list[Seen | Moved] = []
        self.told: list[Message] = []
        first = self.threads.ranks[0]
        rule = rule or Rule(period_s=60.0)
        self.balance = Balance(first, self.experts[0], rule, on_news=self.news.append, clock=lambda: self.now)

    def take(self) -> torch.Tensor:
        return torch.tensor(self.counts)

    def meet(self, message: Message, own: Callable[[], T]) -> T:
        self.told.append(message)
        rank, experts = self.threads.ranks[1], self.experts[1]

        def follow() -> None:
            match decode(encode(message)):
                case Move() as move:
                    experts.start(move)
                case Settle():
                    experts.settle(rank)
                case Report():
                    rank.gather_bytes(experts.report())
                case other:
                    raise AssertionError(other)

        following = OnThread(follow)
        mine = own()
        following.result()
        return mine

    def turns(self, seconds: float, *, until: Callable[[], bool] | None = None) -> None:
        """Let time pass, a turn each second; `until`: take turns until that holds, as threads go on by themselves."""
        for _ in range(int(seconds)):
            self.now += 1.0
            self.balance.turn(self.meet)
        while until and not until():
            self.now += 0.1
            self.balance.turn(self.meet)

    @property
    def moved(self) -> list[Moved]:
        return [each for each in self.news if isinstance(each, Moved)]

    @property
    def seen(self) -> list[Seen]:
        return [each for each in self.news if isinstance(each, Seen)]


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group()
    yield group
    group.balance.close()
    group.experts[1].close()


def test_uneven_experts_move_and_stay_then(group):
    group.turns(61, until=lambda: bool(group.moved))
    assert len(group.seen) >= 12
    assert group.seen[0].loss == pytest.approx(1 - 100 / 140)
    assert group.seen[0].num_slots == 6
    moved = group.moved[0]
    assert (moved.problem, moved.num_layers, moved.num_experts, moved.num_bytes) == (None, 2, 8, 400)
    assert group.stores[0].slots == group.stores[1].slots != LAYERS
    group.turns(10)
    assert group.seen[-1].loss == pytest.approx(0.0)
    group.turns(200)
    assert len(group.moved) == 1, "the same loads move nothing twice"


def test_few_tokens_decide_nothing_and_a_quiet_time_forgets_none(group):
    group.counts = [[20, 20, 1, 1], [1, 1, 20, 20]]
    group.turns(30)
    group.counts = [[0] * 4, [0] * 4]
    group.turns(300)
    assert not group.moved
    assert group.seen[-1].rank_tokens == group.seen[5].rank_tokens != {}
    assert Move not in map(type, group.told)


def test_all_switch_when_the_last_is_ready_and_not_before(group):
    group.stores[1].ready.clear()
    group.turns(61, until=lambda: Settle() in group.told)
    group.turns(20)
    assert not group.moved
    assert group.stores[0].slots == group.stores[1].slots == LAYERS
    group.stores[1].ready.set()
    group.turns(0, until=lambda: bool(group.moved))
    assert group.stores[0].slots == group.stores[1].slots != LAYERS


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [CheckpointError("DAMAGED_FILE", "gone"), OSError("a disk")])
def test_where_a_rank_can_t_nobody_switches_and_it_is_tried_again_ever_later(group, rank, error):
    group.stores[rank].error = error
    group.turns(61, until=lambda: bool(group.moved))
    problem = group.moved[0].problem
    assert problem is not None
    assert problem.startswith(
        f"rank {rank}: {'DAMAGED_FILE: gone' if isinstance(error, CheckpointError) else 'OSError'}"
    )
    assert group.stores[0].slots == group.stores[1].slots == LAYERS
    began = group.now
    for waited in (2, 4, 8, 16, 16):
        count = len(group.moved)
        group.turns(0, until=lambda count=count: len(group.moved) > count)
        assert group.now - began == pytest.approx(60 * waited, abs=30)
        began = group.now
    group.stores[rank].error = None
    group.turns(0, until=lambda: group.moved[-1].problem is None)
    assert group.stores[0].slots != LAYERS


def test_what_was_moved_before_a_failure_stays_moved(group):
    group.turns(61, until=lambda: len([each for each in group.told if isinstance(each, Move)]) == 2)
    group.stores[1].error = OSError("now")
    # The second layer may have been read by then.
    group.turns(0, until=lambda: bool(group.moved))
    assert group.stores[0].slots == group.stores[1].slots
    changed = [layer for layer, slots in group.stores[0].slots.items() if slots != LAYERS[layer]]
    assert len(changed) == group.moved[0].num_layers >= 1


def test_a_decision_that_fails_moves_nothing_and_ends_nobody(group, monkeypatch):
    monkeypatch.setattr(balancing, "decide", lambda *_, **__: 1 // 0)
    group.turns(61, until=lambda: bool(group.moved))
    assert group.moved == [Moved(0, 0, 0, 0.0, "deciding: ZeroDivisionError: integer division or modulo by zero")]
    assert group.stores[0].slots == LAYERS


def test_off_it_looks_and_moves_nothing():
    group = Group(Rule())
    group.turns(300)
    assert group.seen
    assert {type(each) for each in group.told} == {Report}


def test_what_nobody_wants_any_more_is_given_up():
    group = Group()
    group.stores[0].ready.clear()
    group.turns(61, until=lambda: any(isinstance(each, Move) for each in group.told))
    closing = OnThread(group.balance.close)
    closing.result()
    assert not any(thread.name == "experts" and thread.is_alive() for thread in [group.experts[0]._thread])
    group.experts[1].close()


def test_the_rank_that_waits_least_tells_what_meetings_take():
    group = Group()
    for experts, (seconds, meeting_s) in zip(group.experts, [(5.0, 1.0), (5.0, 3.0)], strict=True):
        experts.clock.num_steps, experts.clock.seconds, experts.clock.meeting_s = 3, seconds, meeting_s
    group.turns(5)
    assert group.seen[0].parts == [StepParts(4.0, 1.0, 0.0), StepParts(2.0, 1.0, 2.0)]
    group.turns(5)
    assert not group.seen[1].parts, "no step was counted since"


@contextmanager
def refused(match: str) -> Iterator[None]:
    with pytest.raises(StartupError, match=match) as told:
        yield
    assert told.value.reason == "BAD_RANKS"


def settings(**options: object) -> DecodeSettings:
    return DecodeSettings(model=".", **options)  # type: ignore[arg-type]


def test_what_can_t_move_is_refused_before_anything_is_loaded(tmp_path):
    whole, columns = ParallelLayout.parse("tp2", "ep2"), ParallelLayout.parse("tp2", "tp2")
    assert redundant_experts(settings(), whole) is None
    assert redundant_experts(settings(rebalance="auto:5", redundant_experts=4), whole) == 4
    assert redundant_experts(settings(rebalance="auto"), ParallelLayout()) is None, "one process moves nothing"
    with refused("--rebalance auto moves whole experts.*--experts ep"):
        redundant_experts(settings(rebalance="auto"), columns)
    with refused("--redundant-experts 4 is room which nothing fills"):
        redundant_experts(settings(redundant_experts=4), whole)
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    config = parse_config(tmp_path)
    for redundant, problem in ((3, "do not divide among 2 ranks"), (1000, "0 to")):
        with refused(f"--redundant-experts {redundant}: .*{problem}"):
            with_replicas(whole, config, redundant)


@pytest.mark.parametrize("rebalance", ["on", "auto:0", "auto:-1", "auto:", ""])
def test_an_option_that_says_nothing_is_refused(rebalance):
    with pytest.raises(ValueError, match="rebalance"):
        settings(rebalance=rebalance)


def test_the_room_beside_the_layers_takes_the_bytes_that_are_counted(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    config, like = parse_config(tmp_path), torch.empty(0, dtype=torch.bfloat16)
    count = num_slots(ParallelLayout.parse("tp2", "ep2"), config, 4)
    assert count == (config.moe.num_experts + 4) // 2
    counted = spare_bytes(config, count, torch.bfloat16, AS_NUMBERS)
    assert counted == count * 3 * config.hidden_size * config.moe.intermediate_size * 2
    held = empty_experts(count, config.hidden_size, config.moe.intermediate_size, like)
    tensors = [value for value in vars(held).values() if isinstance(value, torch.Tensor)]
    if tensors:  # packed at once; panels are padded
        assert counted <= sum(tensor.nbytes for tensor in tensors) <= 2 * counted


@pytest.mark.parametrize(
    ("hosts", "nodes"), [("aabb", 2), ("aaaa", 1), ("abab", 1), ("abcd", 1), ("aaab", 1), ("aabbcc", 3)]
)
def test_machines_are_told_by_their_names(hosts, nodes):
    class Hosts(ThreadRank):
        def gather_bytes(self, data: bytes) -> list[bytes]:
            return [host.encode() for host in hosts]

    assert _num_nodes(Hosts(RankThreads(1), 0)) == nodes


def test_a_store_is_one():
    store: Store = FakeStore()
    assert store.slots == LAYERS
    assert balancing.WINDOW * balancing.REPORT_S <= WAIT_S
