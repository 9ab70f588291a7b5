"""A file with an address per line, which somebody else writes while it is read.

    new address in it ─────────────────────────────► listed at once
    listed, and not in it any more ── for 2 s ─────► listed no more; for 10 s if it lists nothing at all
    gone, unreadable, or no line of it an address ─► what was listed stays, with a warning

So a file that is written anew in place, empty for a moment and then half there, costs nobody a worker. A last line that
has no end may be half of one: it counts when the file has stood as it is for those 2 s.
"""

from __future__ import annotations

import asyncio
import codecs
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace_core.address import Address, parse_address
from headrace_core.outside import call_outside

log = logging.getLogger(__name__)

STANDS_S = 2.0
"""How long a file must say the same until what it does not list any more is believed to be gone."""
NOTHING_STANDS_S = 10.0
"""The same for a file that lists nothing."""
_MOST_FILE_BYTES = 1 << 20
"""Far more than as many lines as are followed, with comments."""
_READ_TIMEOUT_S = 1.0
"""How long a reading is waited for before others go on without it."""
_MOST_WARNINGS = 5
"""Bad lines of one reading that are logged one by one."""


@dataclass(frozen=True, slots=True)
class _Said:
    """What one content of the file lists, each address once, in its order."""

    addresses: tuple[Address, ...] = ()
    whole: tuple[Address, ...] = ()
    """Those of lines that end."""
    num_bad: int = 0


class AddressFile:
    """See the module. Event loop only."""

    def __init__(self, path: Path, *, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: of more than `most` addresses `most` and one are kept; `clock` is an argument for tests."""
        self.listed: list[Address] = []
        """What is to be followed now."""
        self._path = path
        self._most = most
        self._clock = clock
        self._reading: asyncio.Future[bytes] | None = None
        self._content: bytes | None = None
        self._since_s = 0.0
        self._said = _Said()
        self._problem = ""

    async def read(self) -> bool:
        """Read it again and return True if `listed` is another one."""
        self._reading = self._reading or call_outside(_read, self._path)
        done, _ = await asyncio.wait([self._reading], timeout=_READ_TIMEOUT_S)
        if not done:
            self._warn(f"no answer in {_READ_TIMEOUT_S:g} s")
            return False
        reading, self._reading = self._reading, None
        try:
            content = reading.result()
        except (OSError, ValueError) as error:
            self._warn(str(error))
            return False
        is_first = self._content is None
        if content != self._content:
            self._content = content
            said = await asyncio.to_thread(_parse, content, self._most)
            if said.addresses != self._said.addresses:
                self._since_s = self._clock()
            self._said = said
        listed = self._believed(is_first=is_first)
        is_new = listed != self.listed or is_first
        self.listed = listed
        return is_new

    def close(self) -> None:
        """Wait for no reading any more."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _believed(self, *, is_first: bool) -> list[Address]:
        said, stood_s = self._said, self._clock() - self._since_s
        if is_first:
            self._warn("")
            return list(said.addresses)
        if not said.addresses and self.listed:
            if said.num_bad or stood_s < NOTHING_STANDS_S:
                until = "" if said.num_bad else f" until it has for {NOTHING_STANDS_S:g} s"
                self._warn(f"it lists nothing; what it listed is kept{until}")
                return self.listed
        elif stood_s < STANDS_S:
            self._warn("")
            return list(dict.fromkeys((*said.whole, *self.listed)))[: self._most + 1]
        self._warn("")
        return list(said.addresses)

    def _warn(self, problem: str) -> None:
        """Log what is wrong with the file, once until it is something else."""
        if problem and problem != self._problem:
            data = {"path": str(self._path), "problem": problem, "kept": len(self.listed)}
            log.warning("can't use the file of addresses", extra=data)
        self._problem = problem


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


def _parse(content: bytes, most: int) -> _Said:
    """Return what a content lists; at most `most` addresses and one. Any thread."""
    found: dict[Address, None] = {}
    last: Address | None = None
    num_bad = 0
    for number, line in _lines(content):
        last = None
        try:
            address = parse_address(line.decode("utf-8"))
        except ValueError as error:
            num_bad += 1
            if num_bad <= _MOST_WARNINGS:
                log.warning(
                    "skipped a line of the file of addresses", extra={"line": number, "problem": _reason(error)}
                )
            continue
        if address not in found:
            found[address] = None
            last = address
        if len(found) > most:
            break
    if num_bad > _MOST_WARNINGS:
        log.warning("skipped more lines of the file of addresses", extra={"lines": num_bad - _MOST_WARNINGS})
    is_cut = not content.endswith((b"\n", b"\r"))
    return _Said(tuple(found), tuple(each for each in found if not (is_cut and each == last)), num_bad)


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that say something, numbered from 1, without comments."""
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        entry = line.partition(b"#")[0].strip()
        if entry:
            yield number, entry


def _reason(error: ValueError) -> str:
    return "it is not UTF-8" if isinstance(error, UnicodeError) else str(error)
