"""The queue's order: fair between clients, and among one's own as they want it: by arrival, or by urgency. Pure.

Start-time fair queueing. What a client has had is a sum of costs; next comes who has had least, so that of clients that
all wait each gets its share of what is served, within one sequence's cost. Virtual time is what a client that waits all
the time has had on average: it advances by cost ÷ number of clients that wait. From that follows the rest.

1. A client that comes starts at virtual time: it has no claim on the time before, and is not held up by others' queues.
2. A client that was not served, because its sequence fits no worker that is free, catches up by one sequence at most.
3. A client that goes is remembered while it is ahead, so going and coming gains nothing; an idle queue forgets all.
4. Time moves on with every sequence, so nobody starves, however many clients come.
5. A sequence that comes again, because its worker failed it, has been paid for and keeps its place. What came before
   it of the same client still does. With one client the order is that of arrival, whatever comes again.

Clients are leaves of a tree, and each level is shared in this way: the names at one address share the address's part.

Source: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996; with the average for virtual time, as in Demers,
Keshav, Shenker, SIGCOMM 1989, because the start time of what is served stands still while new clients come.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Client = tuple[str, ...]
"""A path of names, the outermost level first; of one length for all of a queue."""
Order = tuple[float, ...]


@dataclass(slots=True, eq=False)
class Turn:
    """A sequence's standing, kept from one time in the queue to the next."""

    client: Client
    order: Order
    """Among its client's: of arrival, or by what is more urgent. No two of a queue are equal."""
    cost: float
    place: float | None = None
    """In virtual time of the outermost level; None while it depends on what the client gets."""
    is_paid: bool = False
    """True once it was served."""


class HasTurn(Protocol):
    """What queues."""

    @property
    def turn(self) -> Turn:
        """The sequence's; the same object whenever it queues."""
        ...


E = TypeVar("E", bound=HasTurn)

_MOST_AHEAD = 64
"""Who is ahead and gone that is remembered before it is looked up who is not ahead any more."""


class FairQueue(Generic[E]):
    """Iterating gives the order, and takes no more time than what is taken of it needs. Do not change it meanwhile."""

    def __init__(self) -> None:
        self._entries: set[E] = set()
        self._tree: _Level[E] = _Level()
        self._again: list[E] = []
        """Those with a place, by place, then by arrival."""
        self._again_of: dict[Client, list[E]] = {}
        """The same by client, each in order of arrival; so their places rise as well."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry: E) -> bool:
        return entry in self._entries

    def __iter__(self) -> Iterator[E]:
        fresh = ((place, entry.turn.order, entry) for place, entry in self._tree.walk())
        if not self._again:
            return (entry for _, _, entry in fresh)
        again = ((*_place(entry), entry) for entry in self._again)
        return (entry for _, _, entry in heapq.merge(again, fresh, key=lambda item: item[:2]))

    def add(self, entry: E) -> None:
        """Queue an entry: a new one behind its client's, one that was served before at its place."""
        turn = entry.turn
        self._entries.add(entry)
        siblings = self._again_of.get(turn.client, [])
        index = bisect_left(siblings, turn.order, key=_order)
        if index < len(siblings):  # nothing stands behind what came later of the same client
            after = _place(siblings[index])[0]
            turn.place = after if turn.place is None else min(turn.place, after)
        if turn.place is None:
            self._tree.add(entry)
            return
        self._stand(entry)
        while index and _place(siblings[index - 1])[0] > turn.place:
            index -= 1
            self._move(siblings[index], turn.place)
        for earlier in self._tree.before(turn):
            self._tree.remove(earlier)
            earlier.turn.place = turn.place
            self._stand(earlier)

    def remove(self, entry: E) -> None:
        """Take an entry out that was not served; none of its client's time is spent. Idempotent."""
        if entry not in self._entries:
            return
        self._entries.remove(entry)
        if entry.turn.place is None:
            self._tree.remove(entry)
            return
        del self._again[bisect_left(self._again, _place(entry), key=_place)]
        siblings = self._again_of[entry.turn.client]
        siblings.remove(entry)
        if not siblings:
            del self._again_of[entry.turn.client]

    def serve(self, entry: E) -> None:
        """Take an entry out that starts now, be it out of order; its client has had its cost, once."""
        turn, place = entry.turn, None
        if not turn.is_paid:
            place = self._tree.pay(turn, settles=turn.place is not None)  # else it is taken out there, which settles
            turn.is_paid = True
        self.remove(entry)
        if turn.place is None:
            turn.place = place

    def cost_ahead(self, turn: Turn) -> float:
        """Return what is served before a turn that is not in the queue, if nobody comes any more.

        Of every other client no more than the turn's own client has up to there. Takes a step for each client.
        """
        return sum(entry.turn.cost for entry in self._again) + self._tree.cost_ahead(turn)

    def _stand(self, entry: E) -> None:
        insort(self._again, entry, key=_place)
        insort(self._again_of.setdefault(entry.turn.client, []), entry, key=_order)

    def _move(self, entry: E, place: float) -> None:
        """Bring forward what has a place."""
        del self._again[bisect_left(self._again, _place(entry), key=_place)]
        entry.turn.place = place
        insort(self._again, entry, key=_place)


class _Level(Generic[E]):
    """Those who share at one level; at the last, one client's entries in order of arrival."""

    def __init__(self) -> None:
        self.children: dict[str, _Level[E]] = {}
        """Who waits."""
        self.entries: list[E] = []
        self.cost = 0.0
        """Of all that waits here."""
        self._line: list[tuple[float, Order, str]] = []
        """The children by what they have had, then by the arrival of their first entry."""
        self._keys: dict[str, tuple[float, Order, str]] = {}
        """Where each stands in the line."""
        self._had: dict[str, float] = {}
        """What each has had, of those who wait or are ahead of virtual time."""
        self._time = 0.0
        self._largest = 0.0
        """Cost of one sequence, since the queue was idle."""

    @property
    def first(self) -> Order:
        """Arrival of the entry that is first in its order."""
        return self._line[0][1] if self._line else self.entries[0].turn.order

    def walk(self) -> Iterator[tuple[float, E]]:
        """Yield the entries in order, with what whoever has them will have had when they come."""
        for entry in self.entries:
            yield 0.0, entry
        again: list[tuple[float, Order, str, E, Iterator[tuple[float, E]]]] = []
        position, end = 0, len(self._line)
        while position < end or again:
            if position < end and (not again or self._line[position] < again[0][:3]):
                had, _, name = self._line[position]
                start, position = self._start(had), position + 1
                entries = self.children[name].walk()
                _, entry = next(entries)
            else:
                start, _, name, entry, entries = heapq.heappop(again)
            yield start, entry
            _, following = next(entries, (0.0, None))
            if following is not None:
                heapq.heappush(again, (start + entry.turn.cost, following.turn.order, name, following, entries))

    def add(self, entry: E) -> None:
        """Queue an entry below."""
        path: list[tuple[_Level[E], str]] = []
        level = self
        for name in entry.turn.client:
            path.append((level, name))
            if name not in level.children:
                level.children[name] = _Level()
                level._had[name] = max(level._had.get(name, 0.0), level._time)
            level = level.children[name]
            level.cost += entry.turn.cost
        insort(level.entries, entry, key=_order)
        self._settle(path)

    def remove(self, entry: E) -> None:
        """Take an entry out, and whoever has none left."""
        path = list(self._path(entry.turn))
        leaf = path[-1][0].children[path[-1][1]]
        del leaf.entries[bisect_left(leaf.entries, entry.turn.order, key=_order)]
        for level, name in path:
            level.children[name].cost -= entry.turn.cost
        self._settle(path)

    def cost_ahead(self, turn: Turn) -> float:
        """See `FairQueue.cost_ahead`."""
        ahead = sum(entry.turn.cost for entry in self.before(turn))
        for level, name in reversed(list(self._path(turn))):
            ahead += sum(min(child.cost, ahead + turn.cost) for other, child in level.children.items() if other != name)
        return ahead

    def pay(self, turn: Turn, *, settles: bool) -> float:
        """Count what is served to all who it is served to; return when it started at the outermost level.

        Who does not let it settle takes the turn's entry out next.
        """
        path = list(self._path(turn))
        starts = [level._pay(name, turn.cost) for level, name in path]
        if settles:
            self._settle(path)
        return starts[0]

    def before(self, turn: Turn) -> list[E]:
        """Return the entries of the same client that came earlier."""
        level, name = list(self._path(turn))[-1]
        leaf = level.children.get(name)
        return leaf.entries[: bisect_left(leaf.entries, turn.order, key=_order)] if leaf is not None else []

    def _path(self, turn: Turn) -> Iterator[tuple[_Level[E], str]]:
        """Yield the levels on the way to a client, as far as somebody waits there, and the name at each."""
        level: _Level[E] | None = self
        for name in turn.client:
            if level is None:
                return
            yield level, name
            level = level.children.get(name)

    def _settle(self, path: Sequence[tuple[_Level[E], str]]) -> None:
        """Let everybody on the way to a client stand where it is to stand now; drop who has nothing left."""
        for level, name in reversed(path):
            child = level.children.get(name)
            if child is None:
                continue
            key = level._keys.pop(name, None)
            if key is not None:
                del level._line[bisect_left(level._line, key)]
            if child.entries or child.children:
                key = level._keys[name] = (level._had[name], child.first, name)
                insort(level._line, key)
            else:
                level._drop(name)

    def _start(self, had: float) -> float:
        return max(had, self._time - self._largest)

    def _pay(self, name: str, cost: float) -> float:
        start = self._start(self._had.get(name, self._time))
        self._had[name] = start + cost
        # `start` is later only if others, who could not be served, were passed over: time passes for them as well.
        self._time = max(self._time + cost / (len(self.children) + (name not in self.children)), start)
        self._largest = max(self._largest, cost)
        return start

    def _drop(self, name: str) -> None:
        """Forget who has none left, unless it is ahead."""
        del self.children[name]
        if not self.children:
            self._largest = 0.0
            self._had.clear()
        elif self._had[name] <= self._time:
            del self._had[name]
        if len(self._had) > 2 * len(self.children) + _MOST_AHEAD:
            ahead = {other: had for other, had in self._had.items() if other in self.children or had > self._time}
            self._had = ahead


def _order(entry: HasTurn) -> Order:
    return entry.turn.order


def _place(entry: HasTurn) -> tuple[float, Order]:
    place = entry.turn.place
    assert place is not None, "what comes again has a place"
    return place, entry.turn.order
