"""Which addresses there are: a static list, DNS names looked up again and again, a file read again when it changes."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from pathlib import Path

from headrace_core.errors import StartupError

log = logging.getLogger(__name__)


class Discovery:
    """Resolves what the settings name to `host:port` addresses.

    A DNS name stands for all its A and AAAA records; a look-up that fails keeps the last answer. `localhost` is an
    address like any other: it is one host.
    """

    def __init__(self, workers: str, workers_file: Path | None) -> None:
        """Take the settings.

        Raises:
            StartupError: BAD_ADDRESS, an entry of `workers` is not `host:port`.
        """
        self._static = [entry.strip() for entry in workers.split(",") if entry.strip()]
        for entry in self._static:
            if not _is_address(entry):
                raise StartupError("BAD_ADDRESS", f"--workers: {entry!r} is not host:port")
        self._file = workers_file
        self._file_text: str | None = None
        self._listed: list[str] = []
        self._resolved: dict[str, list[str]] = {}

    def has_file_changed(self) -> bool:
        """Read the file again and return True if it names other workers than before."""
        if self._file is None:
            return False
        try:
            text = self._file.read_text(encoding="utf-8")
        except OSError as error:
            text = ""
            if self._file_text != text:
                log.warning("can't read the workers file", extra={"path": str(self._file), "problem": str(error)})
        if text == self._file_text:
            return False
        self._file_text = text
        entries = [line.split("#")[0].strip() for line in text.splitlines()]
        self._listed = [entry for entry in entries if entry and _is_address(entry)]
        for entry in entries:
            if entry and not _is_address(entry):
                log.warning("skipped a line of the workers file that is not host:port", extra={"line": entry})
        return True

    async def resolve(self) -> set[str]:
        """Return every address, names looked up now."""
        addresses: set[str] = set()
        for entry in [*self._static, *self._listed]:
            host, _, port = entry.rpartition(":")
            if _is_literal(host):
                addresses.add(entry)
            else:
                addresses.update(await self._look_up(entry, host, int(port)))
        return addresses

    async def _look_up(self, entry: str, host: str, port: int) -> list[str]:
        try:
            records = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            if entry not in self._resolved:
                log.warning("can't look up a worker name", extra={"host": host, "problem": str(error)})
                self._resolved[entry] = []
            return self._resolved[entry]
        hosts = sorted({str(record[4][0]) for record in records})
        self._resolved[entry] = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]
        return self._resolved[entry]


def _is_address(entry: str) -> bool:
    host, colon, port = entry.rpartition(":")
    return bool(colon and host and port.isdecimal() and 0 < int(port) < 65536)


def _is_literal(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
