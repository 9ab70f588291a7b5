"""Waiting sequences of several groups, such as routers, which take turns; within a group the oldest goes first.

So a group that has much waiting holds up the others by one sequence each turn, however much it has. Pure.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Grouped(Protocol):
    """What can wait."""

    @property
    def key(self) -> int:
        """Its age: the lower one is older."""
        ...

    @property
    def group(self) -> int:
        """Whose it is."""
        ...


S = TypeVar("S", bound=Grouped)


class TurnQueue(Generic[S]):
    """See the module. No group is empty."""

    def __init__(self) -> None:
        self._groups: OrderedDict[int, list[S]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[S]:
        for waiting in self._groups.values():
            yield from waiting

    def add(self, sequence: S) -> None:
        """Queue a sequence; a group that had none waits for its turn behind the others."""
        insort(self._groups.setdefault(sequence.group, []), sequence, key=_age)
        self._count += 1

    def head(self) -> S:
        """Return whose turn it is; there is somebody."""
        return next(iter(self._groups.values()))[0]

    def take(self) -> S:
        """Remove whose turn it is; the next turn is another group's."""
        head = self.head()
        self.remove(head)
        if head.group in self._groups:
            self._groups.move_to_end(head.group)
        return head

    def remove(self, sequence: S) -> None:
        """Remove a sequence, wherever it waits."""
        waiting = self._groups[sequence.group]
        waiting.remove(sequence)
        if not waiting:
            del self._groups[sequence.group]
        self._count -= 1


def _age(sequence: Grouped) -> int:
    return sequence.key
