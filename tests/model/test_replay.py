"""What the model does the product's lease table and schedulers do: random runs of the model, step by step on both."""

import random

import pytest
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import StepPlan, StepResult
from headrace_core.errors import HandoffLostError, HeadraceError
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.kv.page_pool import PageState
from headrace_core.kv.sequence_pages import PageAllocator, SequencePages
from headrace_core.request import SampledToken, SamplingParams, hash_tokens
from headrace_core.testing.async_test import async_test
from headrace_core.transfer.lease import Lease, LeaseTable
from headrace_core.transfer.values import Order
from headrace_decode.scheduler import DecodeScheduler
from headrace_prefill.events import Admitted, Failed, Sealed
from headrace_prefill.scheduler import PrefillScheduler

from . import holder, taker
from .explore import Wrong
from .faults import ACTIONS as FAULT_ACTIONS
from .faults import check_end
from .world import FREE, NUM_PAGES, State, World, initial
from .worlds import ACTIONS

NUM_RUNS = 100
PAGE_SIZE = 4
PROMPT = [1, 2, 3, 4, 5, 6]
LIMITS = ModelLimits(vocab_size=97, max_context_tokens=64, eos_token_ids=())
LIMITS_OF = {"max_step_tokens": PAGE_SIZE, "max_step_sequences": 4, "max_waiting_sequences": 4}
WORLDS = [
    World("one", faults=("cancel", "deadline", "step fails", "entry garbled", "bytes flip"), has_others=False),
    World("two", faults=("cancel", "step fails"), num_faults=2, has_others=False, is_one_sided=(True, True)),
    World("three", faults=("session lost", "step fails"), num_faults=2, has_others=False, takers=(0, 1)),
]


def spec(k: int, num_known: int) -> SequenceSpec:
    params = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.0, seed=1)
    return SequenceSpec("r", k + 1, 0, PROMPT + [7] * num_known, len(PROMPT), params)


class Engine:
    """One scheduler, stepped by hand; a plan is applied by the next step, and no command comes between."""

    def __init__(self, scheduler: type, pages: PageAllocator) -> None:
        self.scheduler = scheduler(pages, LIMITS, **LIMITS_OF)
        self.planned: StepPlan | None = None

    def plan(self) -> None:
        self.planned = self.planned or self.scheduler.plan(0.0)

    def apply(self, error: HeadraceError | None = None) -> None:
        self.plan()
        plan, self.planned = self.planned, None
        assert plan is not None
        (chunk,) = plan.chunks
        tokens = {chunk.key: [SampledToken(9)]} if chunk.is_sampled else {}
        failures = {chunk.key: error} if error else {}
        self.scheduler.apply(StepResult({} if error else tokens, 0.0, failures=failures), 0.0)

    def counts(self) -> dict[PageState, int]:
        self.scheduler.check_integrity()
        return self.scheduler.load().page_counts


class Product:
    """The product's side; `follow` does what the model did, and compares."""

    def __init__(self, w: World) -> None:
        self.w = w
        self.at_holder = Engine(PrefillScheduler, PageAllocator(NUM_PAGES, PAGE_SIZE))
        self.at_takers = [Engine(DecodeScheduler, PageAllocator(NUM_PAGES, PAGE_SIZE)) for _ in range(2)]
        for engine in self.at_takers:  # of what a taker has already (`num_have_tokens`) the model knows nothing
            engine.scheduler.pages.match = lambda owner, token_ids, **_: SequencePages(owner)
        self.told: list[str] = []
        self.freed: list[int] = []
        pool = self.at_holder.scheduler.pages.pool
        self.table = LeaseTable(incarnation=1, generation=pool.generation, on_end=self._on_end, on_change=lambda: None)
        self.leases: dict[int, Lease] = {}

    def _on_end(self, lease: Lease) -> None:
        self.freed.append(lease.order.spec.attempt - 1)

    def follow(self, action, index: int, before: State, after: State) -> None:
        if action in _AT_HOLDER:
            _AT_HOLDER[action](self, index, before, after)
        elif action in _AT_TAKER:
            _AT_TAKER[action](self, index, before, after)
        self._compare_leases(before, after)
        self._compare_pages(after)

    def _compare_leases(self, before: State, after: State) -> None:
        """The table moves by what the model's loop heard; the real one is told the same and must agree."""
        for k, a in enumerate(after.attempts):
            was, now = before.attempts[k].lease, a.lease
            if now and was != now:
                self._move(k, was, now, after)
            real = self.leases.get(k)
            assert (real.state.value if real else "") == now, f"attempt {k + 1}: {real and real.state} is {now}"
        ended = [k for what, k in after.holder.commands if what == "free"]
        if len(ended) > len([k for what, k in before.holder.commands if what == "free"]):
            assert self.freed[-1] == ended[-1]

    def _move(self, k: int, was: str, now: str, after: State) -> None:
        if not was:
            tokens = spec(k, after.attempts[k].num_known)
            layout = KvLayout(1, PAGE_SIZE, CacheDtype.FLOAT32, LatentAttention(3, 1))
            order = Order((9, 1), tokens, 60.0, hash_tokens(tokens.token_ids), "fa4e", layout)
            self.leases[k] = self.table.create(order)
            if now == "queued":
                return
        lease = self.leases[k]
        if now == "freed":
            self.table.abort(lease, HandoffLostError("TAKER_LOST", "it left"))
        elif now == "open":
            self.table.admit(lease)
        else:
            self.table.complete(lease)

    def _compare_pages(self, after: State) -> None:
        counts = self.at_holder.counts()
        free = sum(owner == FREE for owner, *_ in after.holder.pages)
        assert counts[PageState.FREE] == free, f"the holder has {counts}, the model {after.holder.pages}"
        generations = sum(generation for _, generation, *_ in after.holder.pages)
        pool = self.at_holder.scheduler.pages.pool
        assert sum(map(pool.generation, range(NUM_PAGES))) == generations
        for t, engine in enumerate(self.at_takers):
            counts, pages = engine.counts(), after.takers[t].pages
            quarantined = sum(
                len(a.page_ids)
                for k, a in enumerate(after.attempts)
                if a.seq == "quarantined" and self.w.takers[k] == t
            )
            assert counts[PageState.QUARANTINED] == quarantined
            num_available = engine.scheduler.pages.num_available
            assert num_available == sum(owner == FREE for owner, _ in pages), f"{counts} is {pages}"

    # What the engines' threads do.

    def holder_command(self, _: int, before: State, after: State) -> None:
        what, k = before.holder.commands[0]
        scheduler = self.at_holder.scheduler
        if what == "add":
            scheduler.add(k + 1, spec(k, before.attempts[k].num_known), 0.0)
        else:
            scheduler.free(k + 1)

    def holder_admits(self, k: int, before: State, after: State) -> None:
        self.at_holder.plan()
        self._compare_news(before, after)

    def holder_computes(self, k: int, before: State, after: State) -> None:
        self.at_holder.apply()
        self._compare_news(before, after)

    def holder_fails(self, k: int, before: State, after: State) -> None:
        self.at_holder.apply(HeadraceError("ENGINE_FAILED", "made to fail"))
        self._compare_news(before, after)

    def _compare_news(self, before: State, after: State) -> None:
        real = [
            ("admitted", event.key - 1)
            if isinstance(event, Admitted)
            else ("sealed", event.key - 1, event.first_page)
            if isinstance(event, Sealed)
            else ("failed" if isinstance(event, Failed) else "prefilled", event.key - 1)
            for event in self.at_holder.scheduler.take_events()
        ]
        news = after.holder.news[len(before.holder.news) :]
        assert real == [each[:3] if each[0] == "sealed" else each[:2] for each in news]

    def taker_command(self, t: int, before: State, after: State) -> None:
        what, k = before.takers[t].commands[0]
        scheduler = self.at_takers[t].scheduler
        match what:
            case "add":
                scheduler.add(k + 1, spec(k, before.attempts[k].num_known), 0.0, has_handoff=True)
            case "arrived":
                scheduler.arrived(k + 1, 9)
            case _:
                getattr(scheduler, what)(k + 1)

    def taker_admits(self, k: int, before: State, after: State) -> None:
        engine = self.at_takers[self.w.takers[k]]
        engine.plan()
        assert engine.planned is None, "nothing is computed yet"
        assert [type(event).__name__ for event in engine.scheduler.take_events()][-1] == "PagesReady"

    def taker_computes(self, k: int, before: State, after: State) -> None:
        self.at_takers[self.w.takers[k]].apply()


_AT_HOLDER = {
    holder.commands: Product.holder_command,
    holder.admits: Product.holder_admits,
    holder.computes: Product.holder_computes,
    holder.fails: Product.holder_fails,
}
_AT_TAKER = {
    taker.commands: Product.taker_command,
    taker.admits: Product.taker_admits,
    taker.computes: Product.taker_computes,
}


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
@async_test
async def test_the_product_does_what_the_model_does(world: World):
    dice = random.Random(1)
    num_steps = 0
    for _ in range(NUM_RUNS):
        product, key = Product(world), initial(world)
        while True:
            made = _step(world, key, product, dice)
            if made is None:
                break
            (action, index), after = made
            product.follow(action, index, State(key), State(after))
            key = after
            num_steps += 1
        try:
            check_end(world)(key)
        except Wrong as wrong:
            raise AssertionError(wrong) from wrong
    assert num_steps > 20 * NUM_RUNS


_FAULTS = [(action, index) for action, indices in FAULT_ACTIONS for index in indices]


def _step(world: World, key, product: Product, dice: random.Random):
    """Return what happens next, by chance, and the state after it; None if nothing can."""
    choices = [(action, index) for action, indices in ACTIONS for index in indices]
    dice.shuffle(choices)
    if dice.random() < 0.97:  # most runs come far before something goes wrong
        choices.sort(key=lambda choice: choice in _FAULTS)
    for action, index in choices:
        if action is holder.commands and product.at_holder.planned:
            continue  # the engine's thread hears nothing between plan and apply
        state = State(key)
        if action(world, state, index) is not None:
            return (action, index), state.key()
    return None
