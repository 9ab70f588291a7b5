"""The lease table: every way a lease ends frees its pages, once."""

from collections.abc import Sequence

import pytest
from headrace_core.errors import HandoffLostError, HeadraceError
from headrace_core.testing.async_test import async_test, eventually
from headrace_prefill.handoff import Lease, LeaseState, LeaseTable, cancelled

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
