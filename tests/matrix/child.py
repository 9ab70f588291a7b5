"""A real worker or router in a process of its own, around the fake model, that a test can hold up and ask.

`scene.py` forks these from one process that has imported everything: a cell needs five, and an import of torch takes
longer than a cell. The service is run as its command runs it (`process.run`): signals, drain, exit are the product's.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from headrace_core import process
from headrace_core.config import DecodeSettings, PrefillSettings, ProcessSettings, RouterSettings
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.transfer.memory import new_memory
from headrace_core.transfer.transports import memory_kind
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService
from headrace_router.service import RouterService

from tests.matrix import leftovers
from tests.matrix.stage import DecodeStage, PrefillStage, RouterStage, Stage

VOCAB_SIZE = 258
NUM_PAGES = 512
PAGE_SIZE = 4
_PR_SET_PDEATHSIG = 1


def main(role: str, options: Mapping[str, Any], model: Mapping[str, Any], log: str, pipe: Connection) -> None:
    """Run one process until a signal; `pipe` is how it is asked. Does not return."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    torch.set_num_threads(1)
    settings = settings_of(role, options)
    process.run(lambda: _Watched(_stage(role, settings, model), pipe), settings, role=role)


def settings_of(role: str, options: Mapping[str, Any]) -> ProcessSettings:
    """Return the settings of a process of `role`."""
    if role == "router":
        return RouterSettings(**options)
    common = {"model": ".", "max_step_tokens": 512, **options}
    return PrefillSettings(**common) if role == "prefill" else DecodeSettings(**common)


def _stage(role: str, settings: Any, options: Mapping[str, Any]) -> Stage:
    if role == "router":
        return RouterStage(RouterService(settings))
    model = FakeModel(vocab_size=VOCAB_SIZE, salt=options.get("salt", 1))
    transports = (options["transport"],)
    loaded = loaded_fake_model(
        memory=new_memory(memory_kind(transports)),
        model=model, num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_context_tokens=1024,
        eos_token_ids=(257,), fingerprint=options.get("fingerprint", "fa4e" * 16),
    )  # fmt: skip
    if role == "prefill":
        return PrefillStage(PrefillService(settings, loader=lambda _: loaded, transports=transports), model)
    return DecodeStage(DecodeService(settings, loader=lambda _: loaded, transports=transports), model)


class _Watched:
    """The service, and what it is asked meanwhile: a `process.Service`."""

    def __init__(self, stage: Stage, pipe: Connection) -> None:
        self._stage, self._service, self._pipe = stage, stage.service, pipe
        self.registry, self.failed = self._service.registry, self._service.failed
        self._answering: set[asyncio.Task[None]] = set()

    @property
    def addresses(self) -> Mapping[str, str]:
        """See `process.Service`."""
        return self._service.addresses

    async def start(self) -> str:
        """See `process.Service`."""
        self._before = leftovers.look()
        self._stage.prepare()
        address = await self._service.start()
        self._stage.begin()
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._on_asked)
        self._pipe.send((0, True, address))
        return address

    async def drain(self) -> None:
        """See `process.Service`."""
        await self._service.drain()

    async def stop(self) -> None:
        """See `process.Service`; afterwards say what is left."""
        await self._stage.release()
        await self._service.stop()
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        for answering in self._answering:
            answering.cancel()
        if self._answering:
            await asyncio.wait(self._answering)
        # A router's metrics refer to all that it knew, its connections to workers too, until the process ends.
        has_sockets = not isinstance(self._stage, RouterStage)
        del self._stage, self._service
        self._pipe.send((-1, True, await leftovers.new_since(self._before, has_sockets=has_sockets)))

    def _on_asked(self) -> None:
        while self._pipe.poll():
            try:
                number, name, arguments = self._pipe.recv()
            except EOFError:
                os._exit(1)  # whoever asks is gone
            if name == "hang":
                # Until it is asked something else. gRPC's own threads go on, and answer pings.
                self._pipe.poll(None)
                continue
            task = asyncio.ensure_future(self._answer(number, name, arguments))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        try:
            answer = (number, True, await getattr(self._stage, name)(*arguments))
        except Exception as error:  # noqa: BLE001 - the boundary: it is raised where it was asked
            answer = (number, False, f"{type(error).__name__}: {error}")
        self._pipe.send(answer)
