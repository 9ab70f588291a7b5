"""Which addresses there are: a static list, DNS names looked up again and again, a file read again when it changes.

What comes from outside is taken entry by entry: a line, a name or an answer that can't be used costs itself, is logged
once, and leaves the others as they are. A source that can't be asked at all (a file that is gone, a resolver that does
not answer) keeps what it said last; of files see `address_file.py`. A name that the resolver says does not exist keeps
its addresses, too, until it has said so three times in a row: then those go where nobody is.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from headrace_core.address import Address, parse_address
from headrace_core.address_file import AddressFile
from headrace_core.errors import StartupError
from headrace_core.outside import call_outside

log = logging.getLogger(__name__)

MAX_ADDRESSES = 1024
"""Workers that one router follows, the first ones of the list: its one loop can't carry more connections."""
GONE_ANSWERS = 3
"""Answers in a row that a name does not exist, until it is believed."""
_MOST_LOOKUPS = 32
"""Names that are waited for at a time."""
_LOOKUP_TIMEOUT_S = 5.0
"""How long one is waited for; what it answers later is taken by the next look-up."""
_NO_SUCH_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
"""What a resolver answers of such a name; all else (EAI_AGAIN, EAI_FAIL) is a resolver that fails."""


class Discovery:
    """Resolves what the settings name to `host:port` addresses. Event loop only.

    A DNS name stands for all its A and AAAA records. `localhost` is an address like any other: it is one host.
    """

    def __init__(self, workers: str, workers_file: Path | None, *, name: str = "workers") -> None:
        """Take the settings, `name` and `name`-file.

        Raises:
            StartupError: BAD_ADDRESS, an entry of `workers` is not `host:port`.
        """
        try:
            self._static = [parse_address(entry.strip()) for entry in workers.split(",") if entry.strip()]
        except ValueError as error:
            raise StartupError("BAD_ADDRESS", f"--{name}: {error}") from None
        self.has_news = asyncio.Event()
        """Set when `addresses` may differ; whoever waits for it clears it."""
        self._file = AddressFile(workers_file, most=MAX_ADDRESSES) if workers_file else None
        self._resolved: dict[Address, list[Address]] = {}
        self._problems: dict[Address, str] = {}
        self._lookups: dict[Address, asyncio.Task[None]] = {}
        self._asked: dict[Address, asyncio.Future[set[str]]] = {}
        """What the resolver was asked and has not answered."""
        self._num_gone: Counter[Address] = Counter()
        """How often in a row it said that a name does not exist."""
        self._lookup_slots = asyncio.Semaphore(_MOST_LOOKUPS)
        self._addresses: list[str] | None = None
        """None when they are to be put together anew: they are asked for far more often than they change."""
        self._is_cut = False

    @property
    def addresses(self) -> list[str]:
        """Every address known now, each once, in the order of the settings; at most `MAX_ADDRESSES`."""
        if self._addresses is None:
            self._addresses = self._put_together()
        return self._addresses

    @property
    def _entries(self) -> tuple[Address, ...]:
        return (*self._static, *(self._file.listed if self._file else ()))

    def _put_together(self) -> list[str]:
        found: dict[str, None] = {}
        entries = self._entries
        for address in chain.from_iterable(self._resolved.get(e, ()) if e.is_name else (e,) for e in entries):
            found[str(address)] = None
            if len(found) > MAX_ADDRESSES:
                break
        is_cut = len(found) > MAX_ADDRESSES
        if is_cut and not self._is_cut:
            log.warning("too many worker addresses; the first ones are followed", extra={"followed": MAX_ADDRESSES})
        self._is_cut = is_cut
        return list(found)[:MAX_ADDRESSES]

    async def read_file(self) -> bool:
        """Read the file again and return True if it says something else than before."""
        if self._file is None or not await self._file.read():
            return False
        self._addresses = None
        self.has_news.set()
        return True

    def look_up(self) -> None:
        """Begin to look up every name that is not being looked up; forget those that are no longer named."""
        names = {entry for entry in self._entries if entry.is_name}
        for known in (self._resolved, self._problems, self._num_gone):
            for gone in known.keys() - names:
                del known[gone]
                self._addresses = None
        for gone in self._asked.keys() - names - self._lookups.keys():
            self._asked.pop(gone).cancel()
        for name in names - self._lookups.keys():
            self._lookups[name] = asyncio.create_task(self._look_up(name), name=f"look-up-{name.host}")

    def drop_gone(self, is_there: Callable[[str], bool]) -> None:
        """Of names that are gone keep the addresses alone where somebody is."""
        for name, count in self._num_gone.items():
            known = self._resolved.get(name, [])
            if count < GONE_ANSWERS or not known:
                continue
            kept = [address for address in known if is_there(str(address))]
            if kept != known:
                data = {"host": name.host, "dropped": len(known) - len(kept), "kept": len(kept)}
                log.warning("a worker's name is gone, and so are those that it stood for", extra=data)
                self._resolved[name] = kept
                self._addresses = None

    async def refresh(self, timeout_s: float) -> None:
        """Read the file and look up every name, and wait for all of that, but for look-ups no longer than so."""
        await self.read_file()
        self.look_up()
        if self._lookups:
            await asyncio.wait(self._lookups.values(), timeout=timeout_s)
        self.drop_gone(lambda _: False)

    async def close(self) -> None:
        """End what is under way."""
        if self._file is not None:
            self._file.close()
        lookups = list(self._lookups.values())
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)
        for asked in self._asked.values():
            asked.cancel()

    async def _look_up(self, name: Address) -> None:
        """Ask for one name and keep the answer."""
        try:
            async with self._lookup_slots:
                asked = self._asked.get(name) or call_outside(_resolve, name)
                self._asked[name] = asked
                done, _ = await asyncio.wait([asked], timeout=_LOOKUP_TIMEOUT_S)
            if not done:
                self._warn(name, f"no answer in {_LOOKUP_TIMEOUT_S:g} s")
                return
            del self._asked[name]
            self._keep(name, asked.result())
        except Exception as error:  # noqa: BLE001 - the boundary: whatever a resolver makes of a name costs that name
            if isinstance(error, socket.gaierror) and error.errno in _NO_SUCH_NAME:
                self._num_gone[name] += 1
            self._warn(name, f"{type(error).__name__}: {error}")
        finally:
            del self._lookups[name]

    def _keep(self, name: Address, hosts: set[str]) -> None:
        """Take an answer, without the hosts in it that can't be."""
        answer: list[Address] = []
        problem = ""
        for host in sorted(hosts):
            if len(answer) > MAX_ADDRESSES:
                break
            try:
                address = parse_address(str(Address(host, name.port)))
            except ValueError as error:
                problem = str(error)
                continue
            if address.is_name:
                problem = f"{host!a} is no IP address"
            else:
                answer.append(address)
        self._warn(name, problem)
        self._num_gone.pop(name, None)
        if answer and self._resolved.get(name) != answer:
            self._resolved[name] = answer
            self._addresses = None
            self.has_news.set()

    def _warn(self, name: Address, problem: str) -> None:
        """Log what is wrong with a name's answer, once until it is something else."""
        if problem and problem != self._problems.get(name):
            data = {"host": name.host, "problem": problem, "kept": len(self._resolved.get(name, ()))}
            log.warning("can't use what a worker's name stands for", extra=data)
        self._problems[name] = problem


def _resolve(name: Address) -> set[str]:
    """Return the hosts that a name stands for. Any thread; may hang as long as the resolver does.

    Raises:
        OSError: there is none, or the resolver fails; `socket.gaierror` says which.
    """
    return {str(record[4][0]) for record in socket.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)}
