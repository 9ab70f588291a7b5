"""A router, a pair of workers and a spare pair, each a process, and a client: what a cell plays on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from headrace_client import AsyncClient, ConnectionOptions
from headrace_client.retry import RetryPolicy
from headrace_core.errors import UnavailableError
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.tcp_proxy import TcpProxy
from headrace_router.testing import write_tokenizer

from tests.matrix.process import ChildProcess, Gone

_HOSTS = (f"127.1.{major}.{minor}" for major, minor in itertools.product(range(256), range(1, 255)))
"""Each scene has an address of its own: nobody else is given the port of a process that restarts."""
_DRAIN_S = 30.0
_SETTLED = ("ready", "draining", "refused")
FOREIGN = {"salt": 2, "fingerprint": "beef" * 16}


class Scene:
    """Use as an async context; on the way out every process is gone."""

    def __init__(
        self,
        *,
        transport: str = "grpc",
        num_pairs: int = 1,
        num_spares: int = 0,
        is_proxied: bool = False,
        num_slots: int = 8,
        **router: Any,
    ) -> None:
        """Args: `num_slots` is how many sequences a decode worker runs; `router` are settings of the router."""
        self.transport = transport
        self.is_proxied = is_proxied
        self._num_listed = num_pairs
        self._num_slots = num_slots
        self._router_options = router
        self._host = next(_HOSTS)
        names = [(role, i) for i in range(num_pairs + num_spares) for role in ("prefill", "decode")]
        self.workers = [ChildProcess(f"{role}-{i}", role) for role, i in names]
        self.router = ChildProcess("router", "router")
        self.ended: list[ChildProcess] = []
        """Those that others took the place of."""
        self.proxies: dict[str, TcpProxy] = {}
        """By the name of the process before which it stands."""
        self.folder = Path()

    @property
    def prefill(self) -> ChildProcess:
        """The prefill worker of the first pair."""
        return self.workers[0]

    @property
    def decode(self) -> ChildProcess:
        """The decode worker of the first pair."""
        return self.workers[1]

    @property
    def processes(self) -> Sequence[ChildProcess]:
        """All that should run."""
        return [self.router, *self.workers]

    async def __aenter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-matrix-"))
        try:
            # Without a template: a process that renders would be half of what a router costs here.
            write_tokenizer(self.folder / "tiny", with_template=False)
            self._list(())
            await asyncio.gather(*(self._start(process) for process in self.processes))
            options = ConnectionOptions(retry=RetryPolicy(max_attempts=1))
            self.client = AsyncClient(self.router.listed, options)
            await self.list_workers(self._num_listed)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self._close()

    async def list_workers(self, num_pairs: int | None = None) -> None:
        """Let the router know of so many pairs, or of all, and return when it has them."""
        listed = self.workers[: 2 * num_pairs] if num_pairs else self.workers
        self._list(listed)
        addresses = {process.listed for process in listed if process.is_alive and not process.is_stopped}

        async def is_there() -> bool:
            try:
                workers = (await self.client.server_info(timeout_s=WAIT_S)).workers
            except UnavailableError:
                return False  # a router that has just restarted
            return addresses <= {worker.address for worker in workers if worker.state in _SETTLED}

        await until(is_there)

    async def restart(self, process: ChildProcess, **model: Any) -> ChildProcess:
        """Start another one at the address of one that ended; return it when it serves."""
        successor = ChildProcess(process.name, process.role)
        if process is self.router:
            self.router = successor
        else:
            self.workers[self.workers.index(process)] = successor
        self.ended.append(process)
        await self._start(successor, listen=process.address, **model)
        return successor

    async def on_all(self, name: str, processes: Iterable[ChildProcess] | None = None) -> None:
        """Ask all that run, or these, for the same."""
        asked = [p for p in processes or self.processes if p.is_alive and not p.is_stopped]
        for result in await asyncio.gather(*(process.ask(name) for process in asked), return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, Gone):
                raise result

    async def end(self) -> list[str]:
        """End all in order; return what was left in them, and what was wrong with how they ended."""
        found: list[str] = []
        # The router first, as an operator does: it has nothing more to ask of the workers then.
        for group in (self.ended, [self.router], self.workers):
            found += filter(None, await asyncio.gather(*(process.end() for process in group)))
        return found + [f"{p.name}: {left}" for p in [*self.ended, *self.processes] for left in p.left]

    def logs(self) -> str:
        """Return the last words of all."""
        return "\n".join(process.log() for process in [*self.ended, *self.processes])

    def lines(self, name: str) -> list[str]:
        """Return all that processes of this name logged, also those that ended."""
        logs = sorted(self.folder.glob(f"{name}.*.log"))
        return [line for log in logs for line in log.read_text(errors="replace").splitlines()]

    def keep_logs(self, folder: Path) -> None:
        """Copy every process's whole log to `folder`, in place of what is there."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for log in self.folder.glob("*.log"):
            shutil.copy(log, folder)

    async def _start(self, process: ChildProcess, **options: Any) -> None:
        model = {"transport": self.transport} | {name: options.pop(name) for name in FOREIGN if name in options}
        settings: dict[str, Any] = {"listen": f"{self._host}:0", "log_level": "INFO", "drain_s": _DRAIN_S, **options}
        if self.is_proxied and process.name not in self.proxies:
            self.proxies[process.name] = TcpProxy()
            await self.proxies[process.name].start(self._host)
        proxy = self.proxies.get(process.name)
        if process.role == "router":
            model = {}
            settings |= {"model": self.folder / "tiny", "workers_file": self.folder / "workers", "dns_refresh_s": 0.05}
            settings |= self._router_options
        elif process.role == "decode":
            settings |= {"max_step_sequences": self._num_slots}
        else:
            settings |= {"frame_kib": 4} | ({"advertise": proxy.address} if proxy else {})
        await process.start(self.folder, settings, model)
        if proxy is not None:
            proxy.target, process.listed = process.address, proxy.address

    def _list(self, listed: Iterable[ChildProcess]) -> None:
        scratch = self.folder / "workers.new"
        scratch.write_text("".join(f"{process.listed}\n" for process in listed))
        scratch.replace(self.folder / "workers")

    async def _close(self) -> None:
        await asyncio.gather(*(process.close() for process in [*self.ended, *self.processes]))
        for proxy in self.proxies.values():
            await proxy.close()
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)


async def until(condition: Any) -> None:
    """Return when an asynchronous condition holds."""
    async with asyncio.timeout(WAIT_S):
        while not await condition():  # noqa: ASYNC110 - what is waited for has no event here
            await asyncio.sleep(0.01)
