"""Whom a worker dials: workers that it was told of, and nobody just because a ticket names them.

    --peers, --peers-file              those, found as a router finds its --workers
    neither, but --tls                 every host:port: who answers there must show a worker's certificate
    neither                            this machine's loopback alone

Nothing is looked up as long as nobody is to be dialed. What is not among the peers is looked for once more before it is
refused: a router may know of a worker before this one does.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from pathlib import Path

from headrace_core.address import Address, parse_address
from headrace_core.discovery import Discovery
from headrace_core.errors import PermissionDeniedError

log = logging.getLogger(__name__)

_REFRESH_S = 5.0
"""How old what is known of the peers may be when one of them is dialed."""
_LEAST_REFRESH_S = 0.2
"""Whatever strangers ask to have dialed, the peers are not looked up more often."""
_LOOK_UP_TIMEOUT_S = 3.0


class Peers:
    """See the module. Event loop only."""

    def __init__(self, peers: str, peers_file: Path | None, *, has_tls: bool) -> None:
        """Take the settings.

        Raises:
            StartupError: BAD_ADDRESS, an entry of `peers` is not `host:port`.
        """
        self._discovery = Discovery(peers, peers_file, name="peers")
        self._is_listed = bool(peers.strip() or peers_file)
        self._has_tls = has_tls
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_s = float("-inf")

    def announce(self, listen: str) -> None:
        """Say in the log whom this worker dials, if nobody said; a warning where others can't but be elsewhere."""
        if self._is_listed or self._has_tls:
            return
        is_alone = parse_address(listen, least_port=0).is_loopback
        log.log(
            logging.INFO if is_alone else logging.WARNING,
            "takes pages from workers at loopback addresses alone; --peers names others",
            extra={"listen": listen},
        )

    async def find(self, endpoint: str) -> str:
        """Return the address to dial for a worker at `endpoint`; for a name of a peer, the one that it stands for.

        Raises:
            PermissionDeniedError: NOT_A_PEER.
        """
        try:
            address = parse_address(endpoint)
        except ValueError as error:
            raise PermissionDeniedError("NOT_A_PEER", f"a worker is at host:port: {error}") from None
        if self._is_listed:
            return await self._among_listed(address)
        if self._has_tls or address.is_loopback:
            return str(address)
        problem = f"{address} is none of this worker's peers: without --peers and --tls, only loopback addresses are"
        raise PermissionDeniedError("NOT_A_PEER", problem)

    async def close(self) -> None:
        """End what is being looked up."""
        if self._refreshing:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])
        await self._discovery.close()

    async def _among_listed(self, address: Address) -> str:
        age_s = time.monotonic() - self._refreshed_s
        if age_s > _REFRESH_S:
            self._refresh()
        found = await self._known(address)
        if found is None and (self._refreshing or age_s > _LEAST_REFRESH_S):
            await asyncio.wait([self._refresh()])
            found = await self._known(address)
        if found is None:
            problem = f"{address} is none of the workers that --peers and --peers-file of this worker name"
            raise PermissionDeniedError("NOT_A_PEER", problem)
        return found

    async def _known(self, address: Address) -> str | None:
        known = self._discovery.addresses
        if str(address) in known:
            return str(address)
        if not address.is_name:
            return None
        try:
            async with asyncio.timeout(_LOOK_UP_TIMEOUT_S):
                loop = asyncio.get_running_loop()
                records = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError, TimeoutError):
            return None
        stands_for = (str(Address(str(record[4][0]), address.port)) for record in records)
        return next((each for each in stands_for if each in known), None)

    def _refresh(self) -> asyncio.Task[None]:
        """Look for the peers again, unless somebody is at it."""
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._discovery.refresh(_LOOK_UP_TIMEOUT_S), name="peers")
            self._refreshing.add_done_callback(self._on_refreshed)
        return self._refreshing

    def _on_refreshed(self, refreshing: asyncio.Task[None]) -> None:
        self._refreshing = None
        self._refreshed_s = time.monotonic()
        if not refreshing.cancelled() and (error := refreshing.exception()):
            log.error("looking for peers failed", exc_info=error)
