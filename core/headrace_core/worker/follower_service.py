"""A rank of a group that does not lead, as a process: it serves nobody but its leader.

STARTING ──loaded, all ranks there──► FOLLOWING ──the leader lets go──► STOPPED (exit 0)
                                          └──the group is over──► FAILED (exit 1)

SIGTERM ends nothing by itself while it follows: the leader hears of it with the next beat, and drains.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from headrace_core.config import WorkerSettings
from headrace_core.engine.follower import Follower
from headrace_core.ranks.place import RankPlace
from headrace_core.worker.daemon import on_daemon
from headrace_core.worker.host import Loader

log = logging.getLogger(__name__)


class FollowerService:
    """See the module, and `process.Service`."""

    def __init__(self, settings: WorkerSettings, place: RankPlace, loader: Loader) -> None:
        self.registry = CollectorRegistry()
        self.metrics_port = 0
        self.addresses: Mapping[str, str] = {}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settings = settings
        self._place = place
        self._loader = loader
        self._is_leaving = False
        self._over = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """See `process.Service`; the address is none, only a name for the log."""
        settings = self._settings
        model = await on_daemon(lambda: self._loader(settings), "loading")
        group = model.group
        assert group is not None, "a follower has a leader"
        experts = group.experts and group.experts.own
        follower = Follower(
            group.ranks, model.model, model.cache, group.part, experts, is_leaving=lambda: self._is_leaving
        )
        self._following = asyncio.ensure_future(on_daemon(follower.run, "following"))
        self._following.add_done_callback(self._on_over)
        return str(self._place)

    async def drain(self) -> None:
        """See `process.Service`: the leader drains, and lets go."""
        self._is_leaving = True
        await self._over.wait()

    async def stop(self) -> None:
        """See `process.Service`."""
        if self._following:
            self._following.cancel()

    def _on_over(self, following: asyncio.Task[None]) -> None:
        self._over.set()
        if following.cancelled():
            return
        error = following.exception()
        if error is not None and self._is_leaving:
            log.warning("the group was over before its leader let go", extra={"problem": str(error)})
        elif error is not None:
            self.failed.set_exception(error)
        elif not self._is_leaving:
            log.info("the leader lets go")
            os.kill(os.getpid(), signal.SIGTERM)  # leave as whoever is told to
