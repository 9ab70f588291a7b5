"""Who waits for a worker, by caller. Who comes to a full queue takes the place of who has most in it.

    ARRIVING ──message read──► WAITING ──a worker, an error, the client left──► LEFT
        └─────────────────────────┴── put out: the queue is full, another caller has less ──► LEFT

So a queue is one caller's as long as nobody else wants it. "Most" is by address first, then by name: names can be made
up. Of that caller's requests the oldest is put out whose message nobody reads yet, then the youngest that no worker
has: it has its error before its first token. If none of them can be put out, it is the turn of the caller with the next
most. A caller's own newest call puts out its oldest that sends no message.

Prompts that wait are also bounded in tokens together: who brings one too many is refused, if it has another that waits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from headrace_core.door import RETRY_AFTER_S
from headrace_core.errors import HeadraceError, OverloadedError
from headrace_core.shares import Caller

Evict = Callable[[HeadraceError], bool]
"""Ends what has a place, with an error; returns False if it can't be ended any more, or not yet."""


class Seat:
    """One request's place in the queue."""

    def __init__(self, room: WaitingRoom, caller: Caller, *, is_arriving: bool, evict: Evict, end: Evict) -> None:
        self.caller = caller
        self.is_arriving = is_arriving
        self.evict = evict
        """For another caller."""
        self.end = end
        """As nobody is served any more."""
        self.num_tokens = 0
        """Of its prompt, once it is known."""
        self._room: WaitingRoom | None = room

    def weigh(self, num_tokens: int) -> None:
        """Say how long the prompt is; nothing if the place was given up.

        Raises:
            OverloadedError: QUEUE_FULL, there are too many tokens with those that wait already.
        """
        if self._room is not None:
            self._room.weigh(self, num_tokens)

    def leave(self) -> None:
        """Give the place up; idempotent."""
        room, self._room = self._room, None
        if room is not None:
            room.remove(self)


class _Seats:
    """One caller's places, the oldest first."""

    def __init__(self) -> None:
        self.arriving: dict[Seat, None] = {}
        self.waiting: dict[Seat, None] = {}

    def __len__(self) -> int:
        return len(self.arriving) + len(self.waiting)

    def of_kind(self, is_arriving: bool) -> dict[Seat, None]:
        return self.arriving if is_arriving else self.waiting


class WaitingRoom:
    """The queue's places. Event loop only."""

    def __init__(self, num_seats: int, most_tokens: int = sys.maxsize) -> None:
        """Args: `most_tokens`: of prompts that wait together, but for those of callers of whom nothing else waits."""
        self._num_seats = num_seats
        self._most_tokens = most_tokens
        self._num_tokens = 0
        self.num_taken = 0
        self._seats: dict[str, dict[str, _Seats]] = {}
        """By address and name; none is empty."""

    def take(self, caller: Caller, *, evict: Evict, end: Evict | None = None, is_arriving: bool = False) -> Seat:
        """Give a place; if there is none, that of a caller with more.

        Args:
            caller: whose place.
            evict: ends what has the place for another caller's sake.
            end: ends it as nobody is served any more; None: as `evict` does.
            is_arriving: its message is on its way.

        Raises:
            OverloadedError: QUEUE_FULL.
        """
        if self.num_taken >= self._num_seats and not self._put_out(caller):
            raise OverloadedError(
                "QUEUE_FULL", f"{self.num_taken} requests are waiting; try again later", retry_after_s=RETRY_AFTER_S
            )
        seat = Seat(self, caller, is_arriving=is_arriving, evict=evict, end=end or evict)
        names = self._seats.setdefault(caller.address, {})
        names.setdefault(caller.name, _Seats()).of_kind(is_arriving)[seat] = None
        self.num_taken += 1
        return seat

    def weigh(self, seat: Seat, num_tokens: int) -> None:
        """See `Seat.weigh`."""
        total, names = self._num_tokens + num_tokens, self._seats[seat.caller.address]
        if total > self._most_tokens and _num_seats(names) > 1:
            problem = f"prompts of {self._num_tokens} tokens are waiting, some of them yours; try again later"
            raise OverloadedError("QUEUE_FULL", problem, retry_after_s=RETRY_AFTER_S)
        seat.num_tokens, self._num_tokens = num_tokens, total

    def remove(self, seat: Seat) -> None:
        """Take a place back; `Seat.leave` calls it."""
        self._num_tokens -= seat.num_tokens
        names = self._seats[seat.caller.address]
        seats = names[seat.caller.name]
        del seats.of_kind(seat.is_arriving)[seat]
        if not seats:
            del names[seat.caller.name]
        if not names:
            del self._seats[seat.caller.address]
        self.num_taken -= 1

    def end_all(self, error: HeadraceError) -> None:
        """Put everybody out, with `error`."""
        callers = [seats for names in self._seats.values() for seats in names.values()]
        for seat in [seat for seats in callers for seat in chain(seats.arriving, seats.waiting)]:
            if seat.end(error):
                seat.leave()

    def _put_out(self, caller: Caller) -> bool:
        problem = "the queue is full, most of it is yours, and another request came; try again later"
        error = OverloadedError("QUEUE_FULL", problem, retry_after_s=RETRY_AFTER_S)
        for seat in self._candidates(caller):
            if seat.evict(error):
                seat.leave()
                return True
        return False

    def _candidates(self, caller: Caller) -> Iterator[Seat]:
        """Yield the places that `caller` may take, the best first."""
        own = self._seats.get(caller.address, {})
        own_seats = own.get(caller.name, _Seats())
        num_own = _num_seats(own)
        for names in sorted(self._seats.values(), key=_num_seats, reverse=True):
            if _num_seats(names) > num_own + 1:
                yield from _best_first(names.values())
        yield from _best_first(seats for seats in own.values() if len(seats) > len(own_seats) + 1)
        yield from list(own_seats.arriving)


def _best_first(callers: Iterable[_Seats]) -> Iterator[Seat]:
    for seats in sorted(callers, key=len, reverse=True):
        yield from chain(list(seats.arriving), list(reversed(seats.waiting)))


def _num_seats(names: dict[str, _Seats]) -> int:
    return sum(map(len, names.values()))
