"""Who waits, what could hold them, and who starts next where: the router's queue without sockets. Pure: told the time.

The router runs it on its event loop (`requests/dispatch.py`), the simulator on a simulated clock (`sim_router.py`).
Clients share the queue fairly (`fair_queue`). A round looks at the workers as they are now, less what is promised of
them (`policy.plan`); what it places is no longer in the queue, and promised room at its workers (`promises`), which
`Placed` gives back as they are done with it. Who could not be held by any worker that is there, were it idle, is found
in the round after it came, or after the fleet changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Generic

from headrace_core.errors import HeadraceError

from headrace_router.placement import policy
from headrace_router.placement.capacity import Capacity, Kind, Waiting, WorkerView
from headrace_router.placement.fair_queue import FairQueue
from headrace_router.placement.forecast import Forecast, num_lacking
from headrace_router.placement.overtaken import overtaken
from headrace_router.placement.placed import E, Placed, W
from headrace_router.placement.policy import lacks_prefill
from headrace_router.placement.preferences import Preference, prefix_cache
from headrace_router.placement.roles import Roles


def _nobody(_: object) -> bool:
    return False


class Book(Generic[E, W]):
    """One router's."""

    def __init__(self, preference: Preference = prefix_cache, is_gone: Callable[[E], bool] = _nobody) -> None:
        """Args: `preference` is a named policy; `is_gone` says of an entry that it is not to be placed any more."""
        self.capacity = Capacity(())
        """Of the fleet that is there."""
        self.forecast = Forecast()
        self.roles = Roles()
        self._preference = preference
        self._is_gone = is_gone
        self._num_placed = 0
        self._queue: FairQueue[E] = FairQueue()
        self._kinds: Counter[Kind] = Counter()
        """Of the queue."""
        self._unchecked: list[E] = []
        """Those of the queue of which it is not known yet whether the fleet could hold them."""
        self._second: set[E] = set()
        """Those of the queue that take another route than the fleet's first one."""

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, entry: E) -> bool:
        return entry in self._queue

    def __iter__(self) -> Iterator[E]:
        return iter(self._queue)

    def set_fleet(self, workers: Iterable[WorkerView]) -> None:
        """Take who is there, whether or not it takes work at this moment."""
        self.capacity = Capacity(workers)
        self._unchecked = list(self._queue)
        self._second.clear()

    def add(self, entry: E) -> None:
        """Queue an entry: a new one, or one that comes again."""
        self._queue.add(entry)
        self._kinds[entry.waiting.kind] += 1
        self._unchecked.append(entry)

    def remove(self, entry: E) -> None:
        """Take an entry out that does not start. Idempotent."""
        if entry in self._queue:
            self._queue.remove(entry)
            self._forget(entry)

    def refused(self) -> list[tuple[E, HeadraceError]]:
        """Take out whom no worker that is there could ever hold; return them, and what to tell them."""
        found: list[tuple[E, HeadraceError]] = []
        unchecked, self._unchecked = self._unchecked, []
        for entry in unchecked:
            if entry not in self._queue:
                continue
            error = self.capacity.refusal(entry.waiting)
            if error is not None:
                self.remove(entry)
                found.append((entry, error))
            elif self._takes_second(entry.waiting):
                self._second.add(entry)
        return found

    def is_second(self, entry: E) -> bool:
        """Return True if an entry takes another route than nearly all: `refused` found it so."""
        return entry in self._second

    def plan_round(self, now_s: float, workers: Iterable[W]) -> list[Placed[E, W]]:
        """Return who starts now on these workers, in the queue's order; they are out of the queue."""
        head = next(iter(self._queue), None)
        by_address = {worker.promises.size.address: worker for worker in workers}
        if head is None or not by_address:
            placed: list[Placed[E, W]] = []
        else:
            views = [worker.view(now_s) for worker in by_address.values()]
            is_pressed = lacks_prefill(head.waiting, views)
            starts = self._plan(self.roles.look(now_s, views))
            self.roles.on_round(now_s, is_pressed=is_pressed and bool(self._queue))
            placed = [
                Placed(entry, by_address.get(assignment.prefill), by_address[assignment.decode])
                for entry, assignment in starts
            ]
        cost = sum(each.entry.turn.cost for each in placed)
        self.forecast.on_round(now_s, cost, is_waiting=bool(self._queue))
        return placed

    def wait_s(self, now_s: float, entry: E) -> float:
        """Return how long an entry that is not queued yet is likely to wait."""
        return self.forecast.wait_s(now_s, self._queue.cost_ahead(entry.turn), entry.turn.cost)

    def prompt_s(self, entry: E, workers: Sequence[WorkerView]) -> float:
        """Return how long an entry's prompt is likely to take, once it starts."""
        return self.forecast.prompt_s(num_lacking(entry.waiting, workers))

    def _plan(self, workers: Sequence[WorkerView]) -> list[tuple[E, policy.Assignment]]:
        entries: list[E] = []

        def queue() -> Iterator[Waiting]:
            for entry in self._queue:
                if not self._is_gone(entry):
                    entries.append(entry)
                    yield entry.waiting

        assignments = policy.plan(
            queue(),
            workers,
            self.capacity,
            num_second=len(self._second),
            kinds=self._kinds,
            preference=self._preference,
            turn=self._num_placed,
        )
        self._num_placed += sum(bool(assignment.prefill) for assignment in assignments)
        looked_at = [entry.waiting for entry in entries]
        for index, count in overtaken(looked_at, assignments, workers, self.capacity):
            waiting = looked_at[index]
            entries[index].waiting = replace(waiting, num_overtaken=waiting.num_overtaken + count)
        starts = [(entries[each.index], each) for each in assignments]
        for entry, _ in starts:
            self._queue.serve(entry)
            self._forget(entry)
        return starts

    def _takes_second(self, waiting: Waiting) -> bool:
        capacity = self.capacity
        return capacity.has_second_routes and capacity.route(waiting) not in (None, capacity.first)

    def _forget(self, entry: E) -> None:
        self._second.discard(entry)
        kind = entry.waiting.kind
        self._kinds[kind] -= 1
        if not self._kinds[kind]:
            del self._kinds[kind]
