"""The lease table: every way a lease ends frees its pages, once."""

import asyncio
from collections.abc import Sequence

import pytest
from headrace_core.errors import HandoffLostError, HeadraceError
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.transfer.lease import Lease, LeaseState, LeaseTable, cancelled

INCARNATION = 42
HASH = bytes(range(32))


class Table:
    def __init__(self, lease_s: float = 30.0) -> None:
        self.ended: list[tuple[int, LeaseState | None]] = []
        self.generations = {7: 1, 8: 1}
        self.table = LeaseTable(
            incarnation=INCARNATION,
            lease_s=lease_s,
            generation=lambda page_id: self.generations[page_id],
            on_end=self._on_end,
            on_change=lambda: None,
        )

    def _on_end(self, lease: Lease) -> None:
        self.ended.append((lease.key, lease.outcome))

    def hold(self, request_id: str = "r", attempt: int = 1) -> Lease:
        lease = self.table.create(request_id, sample_index=0, attempt=attempt)
        self.table.hold(lease, (7, 8), (1, 1), HASH)
        return lease

    def held_pages(self, lease: Lease, **fence) -> Sequence[int]:
        right = {"attempt": 1, "incarnation": INCARNATION, "tokens_sha256": HASH}
        return self.table.held_pages(lease.lease_id, **(right | fence))

    def reason(self, lease: Lease, **fence) -> str:
        with pytest.raises(HeadraceError) as raised:
            self.held_pages(lease, **fence)
        return raised.value.reason


@async_test
async def test_a_held_lease_shows_its_pages_to_the_right_ticket_only():
    t = Table()
    lease = t.hold()
    assert t.held_pages(lease) == (7, 8)
    assert t.reason(lease, attempt=2) == "STALE_ATTEMPT"
    for other in (b"", bytes(32), HASH[:16]):
        assert t.reason(lease, tokens_sha256=other) == "TOKENS_MISMATCH"
    assert t.reason(lease, incarnation=1) == "WORKER_RESTARTED"
    t.generations[8] = 2
    assert t.reason(lease) == "STALE_PAGE"


@async_test
async def test_a_lease_not_yet_held_has_no_pages():
    t = Table()
    lease = t.table.create("r", sample_index=0, attempt=1)
    assert t.reason(lease) == "LEASE_EXPIRED"
    t.table.abort(lease, cancelled())


@pytest.mark.parametrize("first", ["take", "abort", "release", "expire"])
@async_test
async def test_pages_are_freed_exactly_once_whatever_comes_after(first: str):
    t = Table(lease_s=0.01 if first == "expire" else 30)
    lease = t.hold()
    if first == "expire":
        await eventually(lambda: bool(t.ended), "the lease has expired")
    elif first == "release":
        t.table.release(lease.lease_id, incarnation=INCARNATION)
    elif first == "abort":
        t.table.abort(lease, cancelled())
    else:
        t.table.take(lease)
    t.table.take(lease)
    t.table.abort(lease, cancelled())
    t.table.release(lease.lease_id, incarnation=INCARNATION)
    outcome = {"abort": LeaseState.ABORTED, "expire": LeaseState.EXPIRED}.get(first, LeaseState.TAKEN)
    assert t.ended == [(lease.key, outcome)]
    assert lease.state is LeaseState.FREED
    assert t.reason(lease) == "LEASE_EXPIRED"
    with pytest.raises(HandoffLostError):
        t.table.renew(lease.lease_id, incarnation=INCARNATION)
    await t.table.wait_idle()


@async_test
async def test_a_higher_attempt_aborts_a_lower_and_the_lower_can_not_come_back():
    t = Table()
    first, second = t.hold(attempt=1), t.hold(attempt=2)
    assert t.ended == [(first.key, LeaseState.ABORTED)]
    for attempt in (1, 2):
        with pytest.raises(HandoffLostError) as raised:
            t.table.create("r", sample_index=0, attempt=attempt)
        assert raised.value.reason == "STALE_ATTEMPT"
    t.table.create("r", sample_index=1, attempt=1)
    assert t.held_pages(second, attempt=2) == (7, 8)


@async_test
async def test_releasing_an_unknown_lease_is_no_error_but_another_incarnation_is():
    t = Table()
    t.table.release("lease-99", incarnation=INCARNATION)
    with pytest.raises(HandoffLostError) as raised:
        t.table.release("lease-99", incarnation=1)
    assert raised.value.reason == "WORKER_RESTARTED"


@async_test
async def test_every_lease_has_a_key_and_a_name_of_its_own():
    t = Table()
    leases = [t.table.create("r", sample_index=index, attempt=4) for index in range(3)]
    assert [lease.key for lease in leases] == [1, 2, 3]
    assert len({lease.lease_id for lease in leases}) == 3
    assert [(lease.request_id, lease.sample_index, lease.attempt) for lease in leases] == [
        ("r", i, 4) for i in range(3)
    ]
    assert t.table.leases == leases


@async_test
async def test_only_leases_with_pages_count_as_held():
    t = Table()
    waiting = t.table.create("waiting", sample_index=0, attempt=1)
    assert t.table.num_held == 0
    held = t.hold()
    assert t.table.num_held == 1
    assert t.table.leases == [waiting, held]
    t.table.take(held)
    assert t.table.num_held == 0
    assert t.table.leases == [waiting]


@async_test
async def test_a_lease_is_held_once():
    t = Table()
    lease = t.table.create("r", sample_index=0, attempt=1)
    assert lease.state is LeaseState.CREATED
    t.table.abort(lease, cancelled())
    with pytest.raises(AssertionError, match="held once"):
        t.table.hold(lease, (7,), (1,), HASH)
    lease = t.hold("other")
    with pytest.raises(AssertionError, match="held once"):
        t.table.hold(lease, (7,), (1,), HASH)


@async_test
async def test_an_attempt_that_is_not_newer_is_told_which_one_is_here():
    t = Table()
    t.hold(attempt=5)
    for attempt in (4, 5):
        with pytest.raises(HandoffLostError, match=f"attempt {attempt} comes after attempt 5"):
            t.table.create("r", sample_index=0, attempt=attempt)
    assert t.ended == []


@async_test
async def test_who_waits_for_an_attempt_learns_that_it_was_replaced():
    t = Table()
    lower = t.hold(attempt=1)
    higher = t.table.create("r", sample_index=0, attempt=3)
    assert isinstance(lower.error, HandoffLostError)
    assert (lower.error.reason, str(lower.error)) == ("STALE_ATTEMPT", "attempt 3 replaced this one")
    assert higher.error is None
    assert t.table.leases == [higher]


@async_test
async def test_the_first_end_of_a_lease_is_the_one_that_is_told():
    t = Table()
    taken, aborted = t.hold("taken"), t.hold("aborted")
    t.table.take(taken)
    t.table.abort(taken, cancelled())
    assert taken.error is None
    first, second = cancelled(), cancelled()
    t.table.abort(aborted, first)
    t.table.abort(aborted, second)
    assert aborted.error is first


@pytest.mark.parametrize(("attempt", "is_aborted"), [(1, False), (2, True), (3, True)])
@async_test
async def test_cancelling_ends_this_attempt_and_those_before_it(attempt: int, is_aborted: bool):
    t = Table()
    lease, other = t.hold(attempt=2), t.hold("other")
    sample = t.table.create("r", sample_index=1, attempt=1)
    t.table.abort_attempts("r", sample_index=0, attempt=attempt)
    assert t.ended == [(lease.key, LeaseState.ABORTED)] * is_aborted
    assert t.table.leases == ([] if is_aborted else [lease]) + [other, sample]
    assert (lease.error.reason if lease.error else None) == ("CANCELLED" if is_aborted else None)


@async_test
async def test_cancelling_what_is_not_here_is_no_error():
    t = Table()
    t.table.abort_attempts("r", sample_index=0, attempt=1)
    assert t.ended == []


@async_test
async def test_a_lease_not_yet_held_can_not_be_released_or_renewed_by_a_ticket():
    t = Table()
    lease = t.table.create("r", sample_index=0, attempt=1)
    t.table.release(lease.lease_id, incarnation=INCARNATION)
    assert t.table.leases == [lease]
    with pytest.raises(HandoffLostError) as raised:
        t.table.renew(lease.lease_id, incarnation=INCARNATION)
    assert raised.value.reason == "LEASE_EXPIRED"


@async_test
async def test_a_page_reused_anywhere_in_the_lease_is_stale():
    for page_id in (7, 8):
        t = Table()
        lease = t.hold()
        t.generations[page_id] = 0
        assert t.reason(lease) == "STALE_PAGE"


@async_test
async def test_a_refused_ticket_is_told_why():
    t = Table()
    lease = t.hold(attempt=2)
    for words, fence in (
        ("the ticket is of attempt 1, the lease of 2", {"attempt": 1}),
        ("an earlier process at this address", {"attempt": 2, "incarnation": 1}),
    ):
        with pytest.raises(HandoffLostError, match=words):
            t.held_pages(lease, **fence)
    t.generations[8] = 2
    with pytest.raises(HandoffLostError, match="page 8 was reused"):
        t.held_pages(lease, attempt=2)
    t.table.take(lease)
    with pytest.raises(HandoffLostError, match=f"{lease.lease_id} is not held: expired, released or aborted"):
        t.table.renew(lease.lease_id, incarnation=INCARNATION)


@async_test
async def test_renewing_starts_the_duration_anew():
    t = Table(lease_s=30)
    lease = t.hold()
    first = lease.timer
    assert first is not None
    assert t.table.renew(lease.lease_id, incarnation=INCARNATION) == 30
    assert first.cancelled()
    assert lease.timer is not None
    assert lease.timer is not first
    assert lease.timer.when() >= first.when()
    t.table.take(lease)
    assert lease.timer.cancelled()


@async_test
async def test_a_lease_that_is_renewed_in_time_outlives_one_that_is_not():
    t = Table(lease_s=0.05)
    kept, left = t.hold("kept"), t.hold("left")
    t.table._lease_s = 10 * WAIT_S
    t.table.renew(kept.lease_id, incarnation=INCARNATION)
    await eventually(lambda: bool(t.ended), "the other lease has expired")
    assert t.ended == [(left.key, LeaseState.EXPIRED)]
    assert t.table.leases == [kept]
    t.table.take(kept)


@async_test
async def test_pages_are_given_back_after_the_lease_is_gone_and_before_anybody_hears_of_it():
    seen: list[tuple[str, LeaseState, list[Lease]]] = []
    table = LeaseTable(
        incarnation=INCARNATION,
        lease_s=30,
        generation=lambda _: 1,
        on_end=lambda lease: seen.append(("end", lease.state, list(table.leases))),
        on_change=lambda: seen.append(("change", lease.state, list(table.leases))),
    )
    lease = table.create("r", sample_index=0, attempt=1)
    table.hold(lease, (7,), (1,), HASH)
    assert seen == [("change", LeaseState.HELD, [lease])]
    seen.clear()
    table.take(lease)
    assert seen == [("end", LeaseState.TAKEN, []), ("change", LeaseState.FREED, [])]


@async_test
async def test_the_table_is_idle_when_the_last_lease_is_gone():
    t = Table()
    await t.table.wait_idle()
    one, two = t.hold("one"), t.hold("two")
    waiting = asyncio.ensure_future(t.table.wait_idle())
    t.table.take(one)
    await asyncio.wait([waiting], timeout=0.01)
    assert not waiting.done()
    t.table.take(two)
    await waiting


@async_test
async def test_a_ticket_releases_its_lease_at_once_and_no_other():
    t = Table()
    lease, other = t.hold(), t.hold("other")
    t.table.release(lease.lease_id, incarnation=INCARNATION)
    assert t.ended == [(lease.key, LeaseState.TAKEN)]
    assert t.table.leases == [other]


@async_test
async def test_a_page_without_a_generation_is_shown_to_nobody():
    t = Table()
    lease = t.table.create("r", sample_index=0, attempt=1)
    t.table.hold(lease, (7, 8), (1,), HASH)
    with pytest.raises(ValueError, match="zip"):
        t.held_pages(lease)


@async_test
async def test_a_foreign_lease_is_named_by_its_first_letters():
    t = Table()
    with pytest.raises(HandoffLostError) as raised:
        t.table.renew("x" * 200, incarnation=INCARNATION)
    assert str(raised.value) == f"{'x' * 80} is not held: expired, released or aborted"


def test_a_cancelled_prefill_says_so():
    assert (cancelled().reason, str(cancelled())) == ("CANCELLED", "the prefill was cancelled")
