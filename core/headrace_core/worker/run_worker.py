"""One process of a worker, from its settings to its exit: all of it, or one rank of its group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from headrace_core.config import WorkerSettings
from headrace_core.process import Service, run
from headrace_core.ranks.place import RankPlace
from headrace_core.worker.follower_service import FollowerService
from headrace_core.worker.host import Loader
from headrace_core.worker.loading import load_worker_model

_LATER_S = 5.0
"""A leader that used up its time to drain still has its streams to end, before it lets its followers go."""


def run_worker(settings: WorkerSettings, place: RankPlace, serve: Callable[[Loader], Service], *, role: str) -> None:
    """Run what `serve` makes, given what loads its model, or follow who does; does not return.

    `role` is as for `process.run`.
    """
    loader = partial(load_worker_model, place=place)
    if place.rank == 0:
        run(lambda: serve(loader), settings, role=role, rank=0 if place.size > 1 else None)
    # Addresses and files are rank 0's: ranks of one machine have the same command line.
    alone = {"metrics_listen": "127.0.0.1:0", "ready_file": None, "drain_s": settings.drain_s + _LATER_S}
    own = settings.model_copy(update=alone)
    run(lambda: FollowerService(own, place, loader), own, role=role, rank=place.rank)
