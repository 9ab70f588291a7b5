"""The lease table: every way a lease ends frees its pages, once."""

import asyncio
from collections.abc import Sequence

import pytest
from headrace_core.batch.spec import SequenceSpec
from headrace_core.errors import HandoffLostError, HeadraceError, UnavailableError
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.request import SamplingParams, hash_tokens
from headrace_core.testing.async_test import async_test
from headrace_core.transfer.lease import Lease, LeaseTable
from headrace_core.transfer.states import LeaseState
from headrace_core.transfer.transport import Reading
from headrace_core.transfer.values import Order, Run

INCARNATION = 42
TOKENS = [1, 2, 3, 4, 5]
GONE = UnavailableError("CANCELLED", "made to go away")


def order(number: int = 1, attempt: int = 1, router_id: int = 9) -> Order:
    spec = SequenceSpec("r", attempt, 0, TOKENS, len(TOKENS), SamplingParams(seed=1))
    layout = KvLayout(2, 4, CacheDtype.FLOAT32, LatentAttention(3, 1))
    return Order((router_id, number), spec, 60.0, hash_tokens(TOKENS), "fa4e", layout)


def run(page_ids: Sequence[int], first_page: int = 0, first_layer: int = 0, num_layers: int = 2) -> Run:
    sums = tuple((0,) * len(page_ids) for _ in range(num_layers))
    return Run(first_layer, first_page, tuple(page_ids), (1,) * len(page_ids), sums)


class Table:
    def __init__(self) -> None:
        self.ended: list[tuple[int, LeaseState | None]] = []
        self.num_changes = 0
        self.generations = {7: 1, 8: 1, 9: 1}
        self.table = LeaseTable(
            incarnation=INCARNATION,
            generation=lambda page_id: self.generations[page_id],
            on_end=self._on_end,
            on_change=self._on_change,
        )

    def _on_end(self, lease: Lease) -> None:
        self.ended.append((lease.key, lease.outcome))

    def _on_change(self) -> None:
        self.num_changes += 1

    def open(self, **what: int) -> Lease:
        lease = self.table.create(order(**what))
        self.table.admit(lease)
        self.table.seal(lease, run([7, 8]))
        return lease

    def hold(self, **what: int) -> Lease:
        lease = self.open(**what)
        self.table.complete(lease)
        return lease

    def pages(self, lease: Lease, *, first_layer=0, num_layers=2, first_page=0, num_pages=2, **fence) -> Sequence[int]:
        right = {"lease_key": lease.lease_key, "incarnation": INCARNATION, "tokens_sha256": hash_tokens(TOKENS)}
        return self.table.held_pages(
            Reading(**(right | fence)),
            first_layer=first_layer,
            num_layers=num_layers,
            first_page=first_page,
            num_pages=num_pages,
        )

    def reason(self, lease: Lease, **fence) -> str:
        with pytest.raises(HeadraceError, match=r"\blease |\bpages? ") as raised:
            self.pages(lease, **fence)
        return raised.value.reason


@pytest.mark.parametrize("is_computed", [False, True], ids=["while it is computed", "when it is"])
@async_test
async def test_sealed_pages_are_shown_to_who_has_the_key_and_takes_them_for_what_they_are(is_computed: bool):
    t = Table()
    lease = t.hold() if is_computed else t.open()
    assert t.pages(lease) == (7, 8)
    assert t.reason(lease, lease_key="lease-1") == "LEASE_ENDED"
    for other in (b"", bytes(32), hash_tokens(TOKENS)[:16]):
        assert t.reason(lease, tokens_sha256=other) == "TOKENS_MISMATCH"
    with pytest.raises(HeadraceError, match="other tokens than the taker's"):
        t.pages(lease, tokens_sha256=b"")
    assert t.reason(lease, incarnation=1) == "WORKER_RESTARTED"
    t.generations[8] = 2
    assert t.reason(lease) == "STALE_PAGE"


PARTS = {
    "a page": ({"first_page": 1, "num_pages": 1}, (8,)),
    "a layer": ({"first_layer": 1, "num_layers": 1}, (7, 8)),
    "none": ({"num_pages": 0}, None),
    "no layer": ({"num_layers": 0}, None),
    "a page too many": ({"num_pages": 3}, None),
    "a page past the end": ({"first_page": 2, "num_pages": 1}, None),
    "a layer too many": ({"num_layers": 3}, None),
    "a layer past the end": ({"first_layer": 2, "num_layers": 1}, None),
    "what would wrap round": ({"first_page": 1, "num_pages": (1 << 32) - 1}, None),
}


@pytest.mark.parametrize(("part", "expected"), PARTS.values(), ids=PARTS)
@async_test
async def test_what_is_not_sealed_is_not_shown(part: dict[str, int], expected: tuple[int, ...] | None):
    t = Table()
    lease = t.open()
    if expected is None:
        assert t.reason(lease, **part) == "BAD_HANDOFF"
    else:
        assert t.pages(lease, **part) == expected


@async_test
async def test_each_run_is_shown_from_when_it_is_sealed():
    t = Table()
    lease = t.open()
    assert t.reason(lease, first_page=2, num_pages=1) == "BAD_HANDOFF"
    t.table.seal(lease, run([9], first_page=2))
    assert t.pages(lease, first_page=2, num_pages=1) == (9,)
    t.generations[7] = 2
    assert t.pages(lease, first_page=2, num_pages=1) == (9,), "what is read was not reused"


@async_test
async def test_a_lease_that_is_queued_has_no_pages_and_nothing_to_confirm():
    t = Table()
    lease = t.table.create(order())
    assert t.reason(lease) == "BAD_HANDOFF"
    with pytest.raises(HeadraceError, match="nothing to confirm while the lease is queued") as raised:
        t.table.confirm(lease)
    assert raised.value.reason == "BAD_REQUEST"
    assert t.ended == []


@pytest.mark.parametrize("page", [7, 8, 9])
@async_test
async def test_the_last_look_sees_a_page_of_any_run_that_was_reused(page: int):
    """The fence of one-sided reads: nobody looked while they were read."""
    t = Table()
    lease = t.open()
    t.table.seal(lease, run([9], first_page=2))
    t.table.complete(lease)
    t.generations[page] = 2
    with pytest.raises(HandoffLostError) as raised:
        t.table.confirm(lease)
    assert raised.value.reason == "STALE_PAGE"
    assert t.ended == [], "who asked is told, and ends it"


@pytest.mark.parametrize("first", ["take", "abort", "confirm"])
@async_test
async def test_pages_are_freed_exactly_once_whatever_comes_after(first: str):
    t = Table()
    lease = t.hold()
    if first == "abort":
        t.table.abort(lease, GONE)
    else:
        getattr(t.table, first)(lease)
    t.table.take(lease)
    t.table.abort(lease, UnavailableError("DRAINING", "later"))
    assert t.ended == [(lease.key, LeaseState.ABORTED if first == "abort" else LeaseState.TAKEN)]
    assert lease.error is (GONE if first == "abort" else None)
    assert lease.state is LeaseState.FREED
    assert lease.is_over
    assert t.reason(lease) == "LEASE_ENDED"
    await t.table.wait_idle()


@async_test
async def test_a_higher_attempt_aborts_a_lower_and_the_lower_can_not_come_back():
    t = Table()
    first, second = t.hold(attempt=1), t.hold(attempt=2)
    assert t.ended == [(first.key, LeaseState.ABORTED)]
    assert first.error is not None
    assert first.error.reason == "STALE_ATTEMPT"
    assert "attempt 2 replaced" in str(first.error)
    for attempt in (1, 2):
        with pytest.raises(HandoffLostError, match=f"attempt {attempt} comes after attempt 2") as raised:
            t.table.create(order(attempt=attempt))
        assert raised.value.reason == "STALE_ATTEMPT"
    assert t.pages(second) == (7, 8)


@async_test
async def test_rule_12_routers_do_not_share_numbers():
    t = Table()
    leases = [t.hold(router_id=9), t.hold(router_id=10), t.hold(router_id=9, number=2)]
    assert t.ended == []
    assert [t.pages(lease) for lease in leases] == [(7, 8)] * 3


@async_test
async def test_every_lease_has_a_key_of_its_own_that_nobody_guesses():
    t = Table()
    leases = [t.table.create(order(number=number)) for number in range(3)]
    assert [lease.key for lease in leases] == [1, 2, 3]
    assert len({lease.lease_key for lease in leases}) == 3
    assert all(len(lease.lease_key) == 32 for lease in leases)


@async_test
async def test_those_held_are_counted_and_waited_for():
    t = Table()
    waiting = asyncio.ensure_future(t.table.wait_idle())
    await waiting
    opened, held = t.open(number=1), t.hold(number=2)
    assert (t.table.num_held, len(t.table.leases), t.num_changes) == (1, 2, 1)
    waiting = asyncio.ensure_future(t.table.wait_idle())
    t.table.confirm(held)
    await asyncio.sleep(0)
    assert (t.table.num_held, waiting.done()) == (0, False)
    t.table.abort(opened, GONE)
    await waiting
    assert t.table.leases == []


@async_test
async def test_a_lease_goes_through_its_states_in_order():
    t = Table()
    lease = t.table.create(order())
    with pytest.raises(AssertionError):
        t.table.seal(lease, run([7]))
    with pytest.raises(AssertionError):
        t.table.complete(lease)
    t.table.admit(lease)
    with pytest.raises(AssertionError):
        t.table.admit(lease)
    t.table.complete(lease)
    t.table.seal(lease, run([7, 8]))
    assert t.pages(lease) == (7, 8), "the last run may be sealed after the first token"
    t.table.confirm(lease)
    with pytest.raises(AssertionError):
        t.table.seal(lease, run([7]))
