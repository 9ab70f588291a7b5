"""Who in the queue was overtaken, and by how many: after so many it claims every worker (`policy.plan`). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from headrace_router.placement.capacity import Capacity, Kind, Route, Waiting, WorkerView
from headrace_router.placement.policy import Assignment, could_decode_for, could_prefill_for

MAX_COUNTED = 256
"""Sequences at the queue's head that are told by how many they were overtaken; the others, once they come so far."""


def overtaken(
    queue: Sequence[Waiting], assignments: Sequence[Assignment], workers: Iterable[WorkerView], capacity: Capacity
) -> Iterator[tuple[int, int]]:
    """Yield who in the queue was overtaken by a plan's assignments: (index, by how many that it competed with).

    Args:
        queue: as it was planned; at least up to the last one assigned.
        assignments: what `plan` made of it.
        workers: those that were given to `plan`.
        capacity: of the fleet.
    """
    placed = {assignment.index for assignment in assignments}
    end = max(placed, default=-1)
    if end < len(placed):
        return  # nobody was passed
    by_address = {worker.address: worker for worker in workers}
    routes: dict[Kind, Route | None] = {}
    passed = islice((index for index in range(end) if index not in placed), MAX_COUNTED)
    for index in passed:
        waiting = queue[index]
        kind = waiting.kind
        route = routes[kind] if kind in routes else routes.setdefault(kind, capacity.route(kind))
        if route is not None:
            behind = (assignment for assignment in assignments if assignment.index > index)
            count = sum(_competes(waiting, route, assignment, by_address) for assignment in behind)
            if count:
                yield index, count


def _competes(waiting: Waiting, route: Route, other: Assignment, workers: Mapping[str, WorkerView]) -> bool:
    """Return True if another one's assignment uses a worker that the sequence could have used in its place."""
    if other.prefill and could_prefill_for(waiting, workers[other.prefill], route):
        return True
    return could_decode_for(waiting, workers[other.decode], route)
