"""One child as its parent sees it: asked, signalled, waited for. See `child.py` for the other end."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import signal
from collections.abc import Mapping
from multiprocessing import connection
from pathlib import Path
from typing import Any

from headrace_core.testing.async_test import WAIT_S

_CONTEXT = multiprocessing.get_context("forkserver")
# The main module too, or every child would import it again.
_CONTEXT.set_forkserver_preload(["__main__", "tests.matrix.child"])
_LOGS = itertools.count()
"""Numbers of logs: one that takes another's place has its name."""
_START, _LEFT, _HANG = 0, -1, -2
"""Numbers of what has no question or no answer: a child's address, what it leaves, that it shall hang."""


class Gone(AssertionError):
    """The process ended before it answered."""


class ChildProcess:
    """One process of a scene. Event loop only."""

    def __init__(self, name: str, role: str) -> None:
        self.name, self.role = name, role
        self.address = ""
        """Where it serves."""
        self.listed = ""
        """Where others are told that it is: itself, or a proxy before it."""
        self.is_stopped = False
        self.is_terminated = False
        self.left: list[str] = []
        """What it left when it ended in order."""
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._log = Path()
        self._process: Any = None

    async def start(self, folder: Path, options: Mapping[str, Any], model: Mapping[str, Any]) -> None:
        """Start it and return when it serves."""
        self._log = folder / f"{self.name}.{next(_LOGS)}.log"
        self._pipe, theirs = _CONTEXT.Pipe()
        arguments = (self.role, dict(options), dict(model), str(self._log), theirs)
        self._process = _CONTEXT.Process(target=_run, args=arguments, name=self.name, daemon=True)
        loop = asyncio.get_running_loop()
        self._asked = {number: loop.create_future() for number in (_START, _LEFT)}
        self._process.start()
        theirs.close()
        loop.add_reader(self._pipe.fileno(), self._on_answer)
        try:
            self.address = self.listed = await self._answer(_START)
        except Gone:
            raise AssertionError(f"{self.name} did not start:\n{self.log()}") from None

    @property
    def is_alive(self) -> bool:
        """True until it ended."""
        return self._process is not None and self._process.exitcode is None

    async def ask(self, name: str, *arguments: Any) -> Any:
        """Return what the stage's method returns.

        Raises:
            Gone: the process ended.
            AssertionError: the method raised.
        """
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._pipe.send((number, name, arguments))
        except OSError:
            raise Gone(f"{self.name} is gone") from None
        return await self._answer(number)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.is_alive:
            os.kill(self._process.pid, number)
            self.is_stopped = number is signal.SIGSTOP
            self.is_terminated = self.is_terminated or number is signal.SIGTERM

    def hang(self) -> None:
        """Let its event loop hang until it is asked something; its connections stand."""
        self._pipe.send((_HANG, "hang", ()))
        self.is_stopped = True

    async def kill(self) -> None:
        """End it at once and return when it is gone."""
        self.signal(signal.SIGKILL)
        await self.ended()

    async def ended(self) -> int:
        """Return its exit code, negative for a signal, when it ended."""
        # Not joined: two threads that read the exit code at once make it 255.
        await asyncio.to_thread(connection.wait, [self._process.sentinel], WAIT_S)
        assert self._process.exitcode is not None, f"{self.name} did not end:\n{self.log()}"
        return self._process.exitcode

    async def end(self) -> str:
        """End it in order, unless it was killed; return what is wrong with how it ended, or empty."""
        if self.is_alive and not self.is_terminated:  # a second SIGTERM ends it at once
            self.signal(signal.SIGTERM)
        if not self.is_terminated:
            return ""
        try:
            self.left = await self._answer(_LEFT)
        except Gone:
            return f"{self.name} ended without a word of what it leaves"
        code = await self.ended()
        return f"{self.name} exited with {code}" if code else ""

    async def close(self) -> None:
        """End it whatever it does, and forget it. Idempotent."""
        if self._process is None:
            return
        await self.kill()
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._pipe.close()
        self._process.close()
        self._process = None

    def log(self, num_lines: int = 40) -> str:
        """Return the last lines it logged."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.is_file() else []
        return "\n".join(f"  {self.name}: {line}" for line in lines[-num_lines:])

    async def _answer(self, number: int) -> Any:
        async with asyncio.timeout(WAIT_S):
            return await self._asked[number]

    def _on_answer(self) -> None:
        try:
            while self._pipe.poll():
                number, is_well, answer = self._pipe.recv()
                self._settle(self._asked[number], is_well, answer)
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            for asked in self._asked.values():
                if not asked.done():
                    asked.set_exception(Gone(f"{self.name} is gone"))
                    asked.exception()  # seen: most are asked of nobody

    def _settle(self, asked: asyncio.Future[Any], is_well: bool, answer: Any) -> None:
        if asked.done():
            return  # who asked has left
        if is_well:
            asked.set_result(answer)
        else:
            asked.set_exception(AssertionError(f"{self.name}: {answer}"))


def _run(*arguments: Any) -> None:
    # Here, and not above: the parent needs neither torch nor the services.
    from tests.matrix import child

    child.main(*arguments)
