"""Whether a worker still lives: SIGSTOP or a hung event loop closes no connection, and no stream ends.

    HEARD ── no load report for 1.4 s ──► SUSPECT ── no answer to a health call in 1 s ──► lost
      ▲                                      │
      └─────────── a load report ────────────┘ an answer: suspect still, and asked again

A suspect worker gets nothing new; a lost one's sequences go on elsewhere. Both times are counted in turns of this
process's own loop (`beats.Silence`): a router that was stopped, or busy with something else, has heard no worker at
all, and that is not their silence. So it does not have a whole fleet's prompts computed again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from headrace_core.beats import Silence
from headrace_core.errors import UnavailableError

TURN_S = 0.2
SUSPECT_TURNS = 7
"""Turns without a load report, of which there are two a second at least, and by the wire's rules one, after which a
worker is suspect: 1.4 to 1.6 s."""
ANSWER_TURNS = 4
"""More turns than these, which is 1 s, without an answer to the health call: then it is lost."""


class Pulse:
    """The signs of life of one connected worker. Event loop only."""

    def __init__(self, health: Any, on_suspect: Callable[[], None]) -> None:
        """Args: `health` is a stub of its health service; `on_suspect` is called when it becomes suspect."""
        self.is_suspect = False
        """True while it has said nothing for so long that it gets nothing new."""
        self._health = health
        self._on_suspect = on_suspect
        self._silence: Silence | None = None

    def heard(self) -> None:
        """Take note of a load report."""
        self.is_suspect = False
        if self._silence is not None:
            self._silence.heard()

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            UnavailableError: WORKER_LOST, it lives no more; as its transport says, the connection is gone.
        """
        while True:
            await self._wait(asyncio.get_running_loop().create_future(), SUSPECT_TURNS)
            self.is_suspect = True
            self._on_suspect()
            await self._ask()

    async def _ask(self) -> None:
        """Return when it answered a health call, be it with a refusal: then it lives."""
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def on_done(_: Any) -> None:
            _settle(answered, True)

        call = self._health.Check(health_pb2.HealthCheckRequest())
        call.add_done_callback(on_done)
        try:
            if not await self._wait(answered, ANSWER_TURNS):
                problem = "it makes no load reports and answers no health call, though its connection stands"
                raise UnavailableError("WORKER_LOST", problem)
            if await call.code() is grpc.StatusCode.UNAVAILABLE:
                raise UnavailableError("WORKER_LOST", await call.details())
        finally:
            call.cancel()

    async def _wait(self, over: asyncio.Future[bool], most_turns: int) -> bool:
        """Return what `over` becomes; False once nothing was heard in more than so many turns."""
        self._silence = Silence(lambda: _settle(over, False), most_turns=most_turns, turn_s=TURN_S)
        try:
            return await over
        finally:
            self._silence.close()


def _settle(future: asyncio.Future[bool], result: bool) -> None:
    if not future.done():
        future.set_result(result)
