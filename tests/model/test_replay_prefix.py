"""What the model of the way back does the product does: prefix holder, leases, schedulers, step by step on both."""

import asyncio
import random
from types import SimpleNamespace

import pytest
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import StepResult
from headrace_core.errors import HeadraceError
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.kv.page_pool import PageState
from headrace_core.kv.sequence_pages import PageAllocator, SequencePages
from headrace_core.request import SampledToken, SamplingParams, hash_tokens
from headrace_core.testing.async_test import async_test
from headrace_core.transfer.values import Order, Run
from headrace_decode.held_prefixes import PrefixHeld
from headrace_decode.metrics import DecodeMetrics
from headrace_decode.prefix_holder import PrefixHolder
from headrace_decode.scheduler import DecodeScheduler
from headrace_prefill.events import Admitted as PrefillAdmitted
from headrace_prefill.events import FetchReady
from headrace_prefill.scheduler import PrefillScheduler
from prometheus_client import CollectorRegistry

from . import prefix_holder, prefix_taker
from .explore import Wrong
from .prefix import ACTIONS, initial_prefix, settle
from .prefix_faults import ACTIONS as FAULT_ACTIONS
from .prefix_faults import check_end
from .prefix_world import PrefixState, PrefixWorld
from .test_replay import LIMITS, LIMITS_OF, PAGE_SIZE
from .world import CACHED, FREE, NUM_PAGES, STRANGER

NUM_RUNS = 100
LAYOUT = KvLayout(1, PAGE_SIZE, CacheDtype.FLOAT32, LatentAttention(3, 1))
PREFIX_TOKENS = list(range(1, NUM_PAGES * PAGE_SIZE + 1))
WORLDS = [
    PrefixWorld("two-sided", faults=("cancel", "bytes flip"), num_faults=2),
    PrefixWorld("one-sided", faults=("cancel", "bytes flip"), num_faults=2, is_one_sided=True),
]


def spec(token_ids: list[int]) -> SequenceSpec:
    return SequenceSpec("r", 1, 0, token_ids, len(token_ids), SamplingParams(seed=1, max_tokens=1, ignore_eos=True))


def run_to_end(scheduler) -> None:
    plan = scheduler.plan(0.0)
    while plan is not None:
        scheduler.apply(StepResult({c.key: [SampledToken(9)] for c in plan.chunks if c.is_sampled}, 0.0), 0.0)
        plan = scheduler.plan(0.0)


class HandSealer:
    """Seals a page when the model does."""

    def __init__(self) -> None:
        self.k = 0
        self.waiting: dict[tuple[int, int], tuple[asyncio.Future[Run], Run]] = {}

    def parts(self, first_page, pages, *, num_layers):
        return [(first_page + index, [page]) for index, page in enumerate(pages)]

    def seal(self, first_page, pages, layers, mark):
        ((page_id, generation),) = pages
        run = Run(0, first_page, (page_id,), (generation,), ((0,),))
        sealing = asyncio.get_running_loop().create_future()
        self.waiting[self.k, first_page] = sealing, run
        return sealing


class Said:
    """What the holder says in a call."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def put(self, message) -> None:
        self.kinds.append(message.WhichOneof("event"))

    def close(self, error=None) -> None:
        self.kinds += ["end"] if error else []


class PrefixProduct:
    """The product's side; `follow` does what the model did, and compares."""

    def __init__(self) -> None:
        pages = PageAllocator(NUM_PAGES, PAGE_SIZE)
        self.decode = DecodeScheduler(pages, LIMITS, **LIMITS_OF)
        answer = SequencePages(owner=1)
        pages.reserve(answer, len(PREFIX_TOKENS))
        pages.commit(answer, PREFIX_TOKENS, len(PREFIX_TOKENS))
        pages.free(answer)
        self.pool = pages.pool
        self.base = self.generations()
        self.commands: list = []
        limits = ModelLimits(vocab_size=1 << 20, max_context_tokens=1 << 20, eos_token_ids=())
        model = SimpleNamespace(layout=LAYOUT, fingerprint="fa4e", pages=None, limits=limits)
        host = SimpleNamespace(
            model=model,
            incarnation=1,
            endpoint="here:1",
            require_ready=lambda: None,
            engine=SimpleNamespace(submit=self.commands.append),
            board=SimpleNamespace(set_num_leases=lambda _: None),
        )
        self.holder = PrefixHolder(
            host, DecodeMetrics(CollectorRegistry()), transports=(), frame_bytes=1, is_ours=lambda _: False
        )
        self.holder.start(model, self.pool.generation)
        self.holder._pages._sealer.close()
        self.sealer = self.holder._pages._sealer = HandSealer()
        self.calls: dict[int, object] = {}
        self.said = [Said(), Said()]
        self.held: list[PrefixHeld] = []
        self.strangers: list[SequencePages] = []
        self.prefills = [
            PrefillScheduler(PageAllocator(NUM_PAGES + 1, PAGE_SIZE), LIMITS, **LIMITS_OF) for _ in range(2)
        ]

    def close(self) -> None:
        """End what waits to be sealed for calls that are over."""
        for sealing, _ in self.sealer.waiting.values():
            sealing.cancel()

    def generations(self) -> int:
        return sum(map(self.pool.generation, range(NUM_PAGES)))

    async def follow(self, action, k: int, before: PrefixState, after: PrefixState) -> None:
        num_said = [len(said.kinds) for said in self.said]
        follow = _FOLLOW.get(action)
        if follow is not None:
            follow(self, k, before)
            for _ in range(4):
                await asyncio.sleep(0)  # what was sealed is published
        for index, (f, was) in enumerate(zip(after.fetches, before.fetches, strict=True)):
            if follow and f.taker_end == "open" and action in _AT_HOLDER:
                told = [kind for kind, *_ in f.down[len(was.down) :]]
                assert self.said[index].kinds[num_said[index] :] == told
            self._compare_lease(index, f)
            self._compare_prefill(index, f)
        self._compare_pages(after)

    def _compare_lease(self, k: int, f) -> None:
        call = self.calls.get(k)
        assert (call.lease.state.value if call else "") == f.lease

    def _compare_prefill(self, k: int, f) -> None:
        scheduler = self.prefills[k]
        scheduler.check_integrity()
        counts, size = scheduler.load().page_counts, NUM_PAGES + 1
        expected = {"fetching": (size, 0), "quarantined": (0, size)}.get(f.seq, (0, 0))
        assert (counts[PageState.OWNED], counts[PageState.QUARANTINED]) == expected, f.seq

    def _compare_pages(self, after: PrefixState) -> None:
        self.decode.pages.check_integrity()
        counts, model = self.decode.load().page_counts, after.holder.pages
        for state, owner in ((PageState.FREE, FREE), (PageState.CACHED, CACHED), (PageState.OWNED, STRANGER)):
            assert counts[state] == sum(who == owner for who, *_ in model), f"{counts} is {model}"
        unused = sum(who == CACHED and not references for who, _, _, references in model)
        assert self.pool.num_unreferenced == unused
        assert self.generations() - self.base == sum(generation for _, generation, *_ in model)

    # The decode worker.

    def hears(self, k: int, before: PrefixState) -> None:
        if before.fetches[k].up[0] == "open":
            order = Order(
                (9, k + 1), spec(PREFIX_TOKENS), 60.0, hash_tokens(PREFIX_TOKENS), "fa4e", LAYOUT, holder_incarnation=1
            )
            self.calls[k] = self.holder.hold(order, self.said[k])
            return
        try:
            self.calls[k].confirm()
        except HeadraceError:
            self.calls[k].end()

    def hears_the_end(self, k: int, before: PrefixState) -> None:
        self.calls[k].end()

    def holder_command(self, _: int, before: PrefixState) -> None:
        self.commands.pop(0)(self.decode)
        self.held += self.decode.take_events()

    def hears_news(self, _: int, before: PrefixState) -> None:
        k, pages = before.holder.news[0]
        event = next(event for event in self.held if event.hold == self.calls[k].lease.key)
        first = self.base // NUM_PAGES
        assert [generation - first for _, generation in event.pages] == [generation for _, generation in pages]
        self.sealer.k = k
        self.holder.on_held(event)

    def seals(self, _: int, before: PrefixState) -> None:
        k, index, *_ = before.holder.sealing[0]
        sealing, run = self.sealer.waiting.pop((k, index))
        sealing.set_result(run)

    def reuse_begins(self, _: int, before: PrefixState) -> None:
        stranger = SequencePages(owner=99)
        self.decode.pages.reserve(stranger, 1)
        self.strangers.append(stranger)

    def reuse_ends(self, _: int, before: PrefixState) -> None:
        self.decode.pages.free(self.strangers.pop())

    # The prefill workers' engines.

    def reserves(self, k: int, before: PrefixState) -> None:
        scheduler = self.prefills[k]
        scheduler.add(1, spec([*PREFIX_TOKENS, 9]), 0.0, num_cached_elsewhere=len(PREFIX_TOKENS))
        assert scheduler.plan(0.0) is None
        (ready,) = scheduler.take_events()
        assert isinstance(ready, FetchReady)
        assert (len(ready.page_ids), ready.num_have_tokens) == (NUM_PAGES, 0)

    def prefill_command(self, k: int, before: PrefixState) -> None:
        command, scheduler = before.fetches[k].commands[0], self.prefills[k]
        if command in ("free", "drained"):
            getattr(scheduler, command)(1)
            return
        scheduler.fetched(1, command[1] * PAGE_SIZE, 0.0)
        for event in scheduler.take_events():
            if isinstance(event, PrefillAdmitted):
                assert event.num_cached_tokens == command[1] * PAGE_SIZE
                run_to_end(scheduler)
                scheduler.free(1)


_AT_HOLDER = {
    prefix_holder.hears: PrefixProduct.hears,
    prefix_holder.hears_news: PrefixProduct.hears_news,
    prefix_holder.seals: PrefixProduct.seals,
}
_FOLLOW = _AT_HOLDER | {
    prefix_holder.hears_the_end: PrefixProduct.hears_the_end,
    prefix_holder.holder_command: PrefixProduct.holder_command,
    prefix_holder.reuse_begins: PrefixProduct.reuse_begins,
    prefix_holder.reuse_ends: PrefixProduct.reuse_ends,
    prefix_taker.reserves: PrefixProduct.reserves,
    prefix_taker.prefill_command: PrefixProduct.prefill_command,
}


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
@async_test
async def test_the_product_does_what_the_model_of_the_way_back_does(world: PrefixWorld):
    dice = random.Random(1)
    num_steps = num_taken = 0
    for _ in range(NUM_RUNS):
        product, key = PrefixProduct(), initial_prefix(world)
        made = _step(world, key, dice)
        while made is not None:
            (action, index), after = made
            await product.follow(action, index, PrefixState(key), PrefixState(after))
            key = after
            num_steps += 1
            made = _step(world, key, dice)
        product.close()
        try:
            check_end(world)(key)
        except Wrong as wrong:
            raise AssertionError(wrong) from wrong
        num_taken += sum(f.is_taken for f in PrefixState(key).fetches)
    assert num_steps > 20 * NUM_RUNS
    assert num_taken > NUM_RUNS // 2


_FAULTS = [(action, index) for action, indices in FAULT_ACTIONS for index in indices]


def _step(world: PrefixWorld, key, dice: random.Random):
    """Return what happens next, by chance, and the state after it; None if nothing can."""
    choices = [(action, index) for action, indices in ACTIONS for index in indices]
    dice.shuffle(choices)
    if dice.random() < 0.97:  # most runs come far before something goes wrong
        choices.sort(key=lambda choice: choice in _FAULTS)
    for action, index in choices:
        state = PrefixState(key)
        if action(world, state, index) is not None:
            settle(world, state)
            return (action, index), state.key()
    return None
