"""Which of the prefill workers that could take a prompt equally well gets it: policies by name (`--placement`). Pure.

Each is a function of the sequence, the workers it may choose among, and how many prompts were placed before. What comes
first is not theirs to say: that there is room, that a worker has not failed the sequence, or has computed some of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import xxhash

from headrace_router.placement.capacity import Waiting, WorkerView

Preference = Callable[[Waiting, Sequence[WorkerView], int], WorkerView]
"""(sequence, workers, turn) to one of the workers."""

_LOAD_STEPS = 4
"""Loads are equal when they are the same quarter of a prefill worker's budget."""


def prefix_cache(waiting: Waiting, workers: Sequence[WorkerView], turn: int) -> WorkerView:
    """Return where the fewest tokens are computed until its first: those in flight, and what the cache lacks of it.

    Loads count in quarters of a budget: among those alike, prompts of the same beginning get the same worker, also
    before its cache has it.
    """
    del turn

    def cost(worker: WorkerView) -> tuple[int, int]:
        quarter = max(worker.token_budget // _LOAD_STEPS, 1)
        cached = waiting.prefix.num_cached_tokens(worker.cached, worker.page_size)
        lacking = waiting.num_tokens - max(cached, waiting.num_cached_tokens)
        return worker.num_tokens_in_flight // quarter * quarter + lacking, _rank(worker, waiting.prefix_key)

    return min(workers, key=cost)


def affinity(waiting: Waiting, workers: Sequence[WorkerView], turn: int) -> WorkerView:
    """Return the least loaded, in quarters of a budget; among equals the one of all prompts with the same beginning."""
    del turn

    def cost(worker: WorkerView) -> tuple[int, int]:
        load = worker.num_tokens_in_flight * _LOAD_STEPS // max(worker.token_budget, 1)
        return load, _rank(worker, waiting.prefix_key)

    return min(workers, key=cost)


def power_of_two(waiting: Waiting, workers: Sequence[WorkerView], turn: int) -> WorkerView:
    """Return the less loaded of two that are drawn."""
    del waiting
    drawn = sorted(workers, key=lambda worker: _rank(worker, turn))[:2]
    return min(drawn, key=lambda worker: worker.num_tokens_in_flight)


def session(waiting: Waiting, workers: Sequence[WorkerView], turn: int) -> WorkerView:
    """Return the one of all prompts of its client, by key or address; where nobody is named, of the same beginning."""
    del turn
    whose = xxhash.xxh3_64_intdigest("\0".join(waiting.client).encode()) if waiting.client else waiting.prefix_key
    return min(workers, key=lambda worker: _rank(worker, whose))


def round_robin(waiting: Waiting, workers: Sequence[WorkerView], turn: int) -> WorkerView:
    """Return them one after the other."""
    del waiting
    return sorted(workers, key=lambda worker: worker.address)[turn % len(workers)]


PREFERENCES: Mapping[str, Preference] = {
    "prefix-cache": prefix_cache,
    "affinity": affinity,
    "power-of-two": power_of_two,
    "session": session,
    "round-robin": round_robin,
}


def _rank(worker: WorkerView, key: int) -> int:
    """Return a number in whose order a key finds the workers: another one for each, and others stay when one goes."""
    return xxhash.xxh3_64_intdigest(worker.address.encode(), seed=key)
