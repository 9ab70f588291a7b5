"""Kills, stops, ends and cuts off processes of a scene in turn, each kind in each phase, and spoils what they say."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator

from tests.load.phases import PHASES
from tests.matrix.process import ChildProcess, Gone
from tests.matrix.scene import Scene
from tests.soak.verdicts import Strike

KINDS = ("kill", "stop", "term", "partition")
FRAME_FAULTS = ("corrupted", "truncated", "duplicated", "reordered")
ROUTER = "router", "running"
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
_ROUTER_EVERY = 12
"""One turn in so many is the router's: what it has under way is lost to its clients."""
_WATCH_S = 5.0
"""Longest wait for a phase to be seen; then the next one's turn comes."""
_AWAY_S = (1.0, 14.0)
"""How long a process is stopped or cut off: not noticed by anybody, or by all."""


class Disturber:
    """What it did is in `struck`, by kind, role and phase, in `strikes`, in order, and in `spoilt`."""

    def __init__(self, scene: Scene, *, pause_s: float, until: asyncio.Event) -> None:
        self.struck: Counter[tuple[str, str, str]] = Counter()
        self.strikes: list[Strike] = []
        self.spoilt: Counter[str] = Counter()
        self._scene = scene
        self._pause_s = pause_s
        self._until = until
        self._random = random.Random(3)
        self._faults = itertools.cycle(
            [("prefill", "spoil_frames", fault) for fault in FRAME_FAULTS]
            + [("decode", "spoil_entries", fault) for fault in FRAME_FAULTS]
        )

    async def run(self) -> None:
        """Go on until told otherwise; then everything serves again."""
        for kind, role, phase in self._turns():
            await self._wait(self._pause_s)
            if self._until.is_set():
                return
            await self._spoil()
            victim = await self._find(role, phase)
            if victim is not None and not self._until.is_set():
                self.struck[kind, role, phase] += 1
                begin_s = time.time()
                await self._strike(kind, victim)
                self.strikes.append(Strike(kind, role, victim.listed, begin_s, time.time()))

    def _turns(self) -> Iterator[tuple[str, str, str]]:
        router_kinds = itertools.cycle(KINDS)
        for number, (kind, (role, phase)) in enumerate(itertools.cycle(itertools.product(KINDS, PHASES)), 1):
            yield kind, role, phase
            if not number % _ROUTER_EVERY:
                yield next(router_kinds), *ROUTER

    async def _strike(self, kind: str, victim: ChildProcess) -> None:
        proxy = self._scene.proxies[victim.name]
        match kind:
            case "partition":
                proxy.freeze()
                await self._wait(self._random.choice(_AWAY_S))
                proxy.thaw()
            case "stop":
                victim.signal(signal.SIGSTOP)
                await self._wait(self._random.choice(_AWAY_S))
                victim.signal(signal.SIGCONT)
            case _:
                victim.signal(_SIGNALS[kind])
                code = await victim.ended()
                assert code == {"kill": -signal.SIGKILL, "term": 0}[kind], f"{victim.name} ended with {code} by {kind}"
                await self._scene.restart(victim)
        await self._scene.list_workers()

    async def _spoil(self) -> None:
        role, command, fault = next(self._faults)
        worker = self._random.choice([worker for worker in self._scene.workers if worker.role == role])
        await worker.ask(command, fault)
        self.spoilt[f"{role} {fault}"] += 1

    async def _find(self, role: str, phase: str) -> ChildProcess | None:
        if role == "router":
            return self._scene.router
        deadline = time.monotonic() + _WATCH_S
        while time.monotonic() < deadline and not self._until.is_set():
            for worker in self._scene.workers:
                try:
                    if worker.role == role and PHASES[role, phase](await worker.ask("gauges")):
                        return worker
                except Gone:
                    continue
        return None

    async def _wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._until.wait(), seconds)
        except TimeoutError:
            return
