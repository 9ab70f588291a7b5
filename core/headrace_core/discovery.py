"""Which addresses there are: a static list, DNS names looked up again and again, a file read again when it changes.

What comes from outside is taken entry by entry: a line, a name or an answer that can't be used costs itself, is logged
once, and leaves the others as they are. A source that can't be asked at all (a file that is gone, a resolver that does
not answer) keeps what it said last.
"""

from __future__ import annotations

import asyncio
import codecs
import logging
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from headrace_core.address import Address, parse_address
from headrace_core.errors import StartupError

log = logging.getLogger(__name__)

MAX_ADDRESSES = 1024
"""Workers that one router follows, the first ones of the list: its one loop can't carry more connections."""
_MOST_FILE_BYTES = 1 << 20
"""Far more than `MAX_ADDRESSES` lines with comments."""
_MOST_LOOKUPS = 3
"""Names asked for at a time: resolvers share few threads, with the file's reader among others."""
_MOST_WARNINGS = 5
"""Bad lines of one reading that are logged one by one."""


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
        self._file = workers_file
        self._file_bytes: bytes | None = None
        self._file_problem = ""
        self._listed: list[Address] = []
        self._resolved: dict[Address, list[Address]] = {}
        self._problems: dict[Address, str] = {}
        self._lookups: dict[Address, asyncio.Task[None]] = {}
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

    def _put_together(self) -> list[str]:
        found: dict[str, None] = {}
        entries = (*self._static, *self._listed)
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
        if self._file is None:
            return False
        try:
            content = await asyncio.to_thread(_read, self._file)
        except (OSError, ValueError) as error:
            problem = str(error)
            if problem != self._file_problem:
                data = {"path": str(self._file), "problem": problem, "kept": len(self._listed)}
                log.warning("can't read the workers file", extra=data)
            self._file_problem = problem
            return False
        self._file_problem = ""
        if content == self._file_bytes:
            return False
        self._file_bytes = content
        self._listed = await asyncio.to_thread(_parse, content)
        self._addresses = None
        self.has_news.set()
        return True

    def look_up(self) -> None:
        """Begin to look up every name that is not being looked up; forget those that are no longer named."""
        names = {entry for entry in (*self._static, *self._listed) if entry.is_name}
        for known in (self._resolved, self._problems):
            for gone in known.keys() - names:
                del known[gone]
                self._addresses = None
        for name in names - self._lookups.keys():
            self._lookups[name] = asyncio.create_task(self._look_up(name), name=f"look-up-{name.host}")

    async def refresh(self, timeout_s: float) -> None:
        """Read the file and look up every name, and wait for all of that, but for look-ups no longer than so."""
        await self.read_file()
        self.look_up()
        if self._lookups:
            await asyncio.wait(self._lookups.values(), timeout=timeout_s)

    async def close(self) -> None:
        """End the look-ups under way."""
        lookups = list(self._lookups.values())
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)

    async def _look_up(self, name: Address) -> None:
        """Ask for one name and keep the answer."""
        try:
            async with self._lookup_slots:
                loop = asyncio.get_running_loop()
                records = await loop.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
            self._keep(name, {str(record[4][0]) for record in records})
        except Exception as error:  # noqa: BLE001 - the boundary: whatever a resolver makes of a name costs that name
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


def _read(path: Path) -> bytes:
    """Return the file's bytes. Any thread.

    Raises:
        OSError: it can't be read.
        ValueError: it is no list of addresses, by its kind or size.
    """
    # A pipe or a device would block the reader, or never end.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(_MOST_FILE_BYTES + 1)
    if len(content) > _MOST_FILE_BYTES:
        raise ValueError(f"it is larger than {_MOST_FILE_BYTES >> 20} MiB")
    return content


def _parse(content: bytes) -> list[Address]:
    """Return the addresses of a file, each once, in its order; at most one more than are followed. Any thread."""
    found: dict[Address, None] = {}
    num_bad = 0
    for number, line in _lines(content):
        try:
            found[parse_address(line.decode("utf-8"))] = None
        except ValueError as error:
            num_bad += 1
            if num_bad <= _MOST_WARNINGS:
                data = {"line": number, "problem": _reason(error)}
                log.warning("skipped a line of the workers file", extra=data)
        if len(found) > MAX_ADDRESSES:
            break
    if num_bad > _MOST_WARNINGS:
        log.warning("skipped more lines of the workers file", extra={"lines": num_bad - _MOST_WARNINGS})
    return list(found)


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that say something, numbered from 1, without comments."""
    lines: Iterable[bytes] = content.removeprefix(codecs.BOM_UTF8).splitlines()
    for number, line in enumerate(lines, 1):
        entry = line.partition(b"#")[0].strip()
        if entry:
            yield number, entry


def _reason(error: ValueError) -> str:
    return "it is not UTF-8" if isinstance(error, UnicodeError) else str(error)
