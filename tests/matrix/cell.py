"""Plays one cell: brings a request into its phase, lets the event strike, and looks at everything that is left."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from headrace_core.testing.async_test import WAIT_S

from tests.matrix.asking import OTHER_PROMPT, PARAMS, PROMPT, Asking
from tests.matrix.events import STRIKES
from tests.matrix.process import Gone
from tests.matrix.scene import Scene
from tests.matrix.table import EXACT, Cell

_DEADLINES_S = (2.0, 8.0, 40.0)
"""Tried in turn: one must be long enough for this machine to reach the phase, or it strikes before."""
_DECODED = 2
"""Steps of the decode worker before it is held."""
_STEPS_GATE = {"dispatched": "prefill", "prefilling": "prefill", "queued": "decode", "decoding": "decode"}
"""Phases that are a step which does not end, and whose."""
ROUTER_LOST = ("UNREACHABLE", "CONNECTION_LOST")


@dataclass(slots=True)
class Result:
    """How a cell ended; `problems` is empty if all is as it must be."""

    event: str
    phase: str
    transport: str
    end: str = ""
    causes: dict[str, int] = field(default_factory=dict[str, int])
    """Attempts that failed, by reason."""
    free_s: float = 0.0
    """From the end of the requests, when what was stopped or cut off was let go, until every page was free."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list[str])

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


class MissedPhase(Exception):
    """The request ended before it was where it should be struck."""


async def play(cell: Cell, wanted: Sequence[Sequence[int]]) -> Result:
    """Play a cell. `wanted` are the tokens of `PROMPT` and of `OTHER_PROMPT`, computed alone."""
    result = Result(cell.event.name, cell.phase, cell.transport)
    began_s = time.monotonic()
    timeouts = _DEADLINES_S if cell.event.name == "deadline" else (2 * WAIT_S,)
    for timeout_s in timeouts:
        try:
            await Play(cell, wanted, result, timeout_s).run()
            break
        except MissedPhase as missed:
            result.problems = [f"missed its phase: {missed}"]
    result.seconds = time.monotonic() - began_s
    return result


class Play:
    """One try at a cell."""

    def __init__(self, cell: Cell, wanted: Sequence[Sequence[int]], result: Result, timeout_s: float) -> None:
        self.cell, self.phase, self.params = cell, cell.phase, PARAMS
        self._wanted, self._other_wanted = wanted
        self._result = result
        self._timeout_s = timeout_s
        self.scene = Scene(
            transport=cell.transport,
            num_spares=int(cell.event.has_spare),
            is_proxied=cell.event.is_proxied,
            num_slots=1 if cell.phase == "queued" else 8,
        )
        self.asking: Asking
        self._other: Asking | None = None

    async def run(self) -> None:
        """Play it; what is wrong goes into the result's problems."""
        self._result.problems = []
        async with self.scene:
            try:
                await self._play()
            except MissedPhase:
                raise
            except (AssertionError, TimeoutError) as error:
                self._result.problems.append(f"{type(error).__name__}: {error}")
            finally:
                self._stop_asking()
                if self._result.problems:
                    self._result.problems.append(self.scene.logs())

    async def _play(self) -> None:
        event, result = self.cell.event, self._result
        await self._shut()
        await self._ask()
        await self._reach()
        if event.has_spare and self.phase != "queued":
            await self.scene.list_workers()
        await STRIKES[event.name](self)
        if event.has_spare and self.phase == "queued":
            await self.scene.list_workers()
        await self.scene.on_all("release")
        if event.name.endswith("out_of_pages"):
            await self._starve()
        if event.name == "slow_reader":
            await self._wait_free()
            self.asking.read_on()
        result.end = await self._end_of(self.asking)
        if self._other is not None:
            self._check_other(await self._end_of(self._other))
        await self._heal()
        ended_s = time.monotonic()
        await self._wait_free()
        result.free_s = time.monotonic() - ended_s
        with contextlib.suppress(Gone):  # it was ended
            result.causes = await self.scene.router.ask("failures")
        result.problems += self._judge()
        result.problems += await self.scene.end()

    async def _shut(self) -> None:
        num_before = int(self.cell.event.is_second_attempt)
        scene, phase = self.scene, self.phase
        if num_before:
            await scene.prefill.ask("spoil_frames", "corrupted")
            if scene.transport != "grpc":
                await scene.decode.ask("spoil_bytes", "corrupted")
        if phase in ("queued", "decoding"):
            await scene.decode.ask("hold_steps", _DECODED)
        elif phase in ("dispatched", "prefilling"):
            await scene.prefill.ask("hold_steps", num_before)
        elif phase == "transferring":
            await self._mover().ask("shut", phase, num_before)
        else:
            await {"publishing": scene.prefill, "finishing": scene.decode}[phase].ask(
                "shut", phase, num_before if phase == "publishing" else 0
            )

    def _mover(self) -> Any:
        """Return who is held while bytes move: where bytes are sent, or for one-sided transports where they land."""
        return self.scene.prefill if self.scene.transport == "grpc" else self.scene.decode

    async def _ask(self) -> None:
        if self.phase in ("queued", "dispatched"):
            # Another one's step is held, and behind it the request waits.
            self._other = Asking(
                self.scene.client, OTHER_PROMPT, self._other_wanted, timeout_s=2 * WAIT_S, name="before"
            )
            await getattr(self.scene, _STEPS_GATE[self.phase]).ask("step_held")
        self.asking = Asking(self.scene.client, PROMPT, self._wanted, timeout_s=self._timeout_s, name="asked")

    async def _reach(self) -> None:
        """Return when the request stands in its phase."""
        reaching = asyncio.ensure_future(self._stand())
        try:
            await asyncio.wait([reaching, self.asking.outcome], return_when=asyncio.FIRST_COMPLETED)
            if not reaching.done():
                raise MissedPhase(f"it ended before: {self.asking.outcome.result()}")
            reaching.result()
            if self.asking.outcome.done():
                raise MissedPhase(f"it ended: {self.asking.outcome.result()}")
        finally:
            reaching.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await reaching

    async def _stand(self) -> None:
        scene = self.scene
        match self.phase:
            case "queued":
                await scene.router.ask("queued", 1)
            case "dispatched":
                await scene.prefill.ask("dispatched")
            case "prefilling":
                await scene.prefill.ask("step_held")
            case "publishing":
                await scene.prefill.ask("reached", self.phase)
                await self.asking.has_tokens(1)
            case "transferring":
                await self._mover().ask("reached", self.phase)
                await self.asking.has_tokens(1)
            case "decoding":
                await scene.decode.ask("step_held")
                await self.asking.has_tokens(1 + _DECODED)
            case _:
                await scene.decode.ask("reached", self.phase)

    async def _starve(self) -> None:
        """Return when the request waits for pages that nobody gives, and give them."""
        scene = self.scene
        is_prefill = self.cell.event.name.startswith("prefill")
        victim = scene.prefill if is_prefill else scene.decode
        if self._other is not None and is_prefill:
            self._check_other(await self._end_of(self._other))
        if self.phase != "queued" or not is_prefill:
            await victim.ask("waiting")
        if self.phase == "queued":
            await scene.router.ask("queued", 1)
        assert not self.asking.outcome.done(), f"it ended without a page: {self.asking.outcome.result()}"
        if self.phase == "decoding":
            assert await scene.decode.ask("num_preemptions") == 1, "it gave way"
        await victim.ask("give_pages")

    async def _end_of(self, asking: Asking) -> str:
        async with asyncio.timeout(2 * WAIT_S):
            return await asyncio.shield(asking.outcome)

    async def _heal(self) -> None:
        """Let go on what was stopped or cut off: it must not disturb what came after it."""
        for proxy in self.scene.proxies.values():
            proxy.thaw()
        for process in self.scene.processes:
            if process.is_stopped:
                process.signal(signal.SIGCONT)
                await process.ask("release")

    async def _wait_free(self) -> None:
        await self.scene.on_all("free")

    def _check_other(self, end: str) -> None:
        may_be = (EXACT, *ROUTER_LOST) if self.cell.event.ends[self.phase] in ROUTER_LOST else (EXACT,)
        assert end in may_be, f"the request before it: {end}"

    def _judge(self) -> list[str]:
        event, result = self.cell.event, self._result
        problems: list[str] = []
        if result.end != event.ends[self.phase]:
            problems.append(f"it ended with {result.end}, not with {event.ends[self.phase]}")
        if strange := set(result.causes) - set(event.causes):
            problems.append(f"attempts failed with {', '.join(sorted(strange))}")
        if self.phase in event.retried and not result.causes:
            problems.append("the event changed nothing: no attempt failed")
        return problems

    def _stop_asking(self) -> None:
        for asking in (getattr(self, "asking", None), self._other):
            if asking is not None:
                asking.leave()
                asking.outcome.cancel()
