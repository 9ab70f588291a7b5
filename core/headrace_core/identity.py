"""Who a process is to the others: what its certificate says, signed by an authority that all of them know.

    spiffe://headrace/decode/rack-3     a URI: the role, and a name among those of the role
    worker.headrace.internal            a DNS name: what it may serve as; `router.` for a router, none for who only asks

A server reads the caller's URI. A channel looks for the server's DNS name rather than for its address: workers are
found by address, and have new ones all the time (docs/adr/0015-identities.md).
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import grpc

from headrace_core.errors import StartupError
from headrace_core.tls_files import Pems, TlsFiles

_ID = re.compile(r"spiffe://headrace/([a-z]+)/([A-Za-z0-9][A-Za-z0-9._-]{0,63})")
CERT, KEY, ROOTS = "tls.crt", "tls.key", "ca.crt"
"""Files of an identity's folder, as Kubernetes and cert-manager name them."""


class Role(Enum):
    """What a process is, and so what it may ask of others (`authority.py`)."""

    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    """Also of a worker that does both."""
    CLIENT = "client"
    OPERATOR = "operator"
    """Of people and their tools: looks at everything, drains workers."""

    @property
    def server_name(self) -> str:
        """What a process of this role serves as; empty if it does not."""
        if self in WORKERS:
            return "worker.headrace.internal"
        return "router.headrace.internal" if self is Role.ROUTER else ""


WORKERS = frozenset({Role.PREFILL, Role.DECODE})


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom a certificate names."""

    role: Role
    name: str

    @property
    def uri(self) -> str:
        """Its URI."""
        return f"spiffe://headrace/{self.role.value}/{self.name}"

    @staticmethod
    def of(uri: str) -> Peer | None:
        """Return whom `uri` names; None if that is nobody of ours."""
        found = _ID.fullmatch(uri)
        roles = {role.value: role for role in Role}
        return Peer(roles[found[1]], found[2]) if found and found[1] in roles else None


@dataclass(frozen=True, slots=True)
class ChannelTls:
    """What a channel encrypts with; `server_name` is what the server's certificate must say, empty: its address."""

    credentials: grpc.ChannelCredentials
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class CallTls:
    """What a call without gRPC's library encrypts with; `server_name` is what the server's certificate must say."""

    context: ssl.SSLContext
    server_name: str


class Identity(TlsFiles):
    """A process's own certificate. Any thread."""

    def __init__(self, folder: Path, *roles: Role) -> None:
        """Read what is in `folder`, which must be of one of these roles.

        Raises:
            StartupError: BAD_TLS, a file is missing, expired, of another role; says which and what to do.
        """
        self._folder = folder
        self._roles = roles
        super().__init__(folder / CERT, folder / KEY, folder / ROOTS, server_name=roles[0].server_name)

    @staticmethod
    def load(folder: Path | None, *roles: Role) -> Identity | None:
        """Return the identity in `folder`; None without one. Raises as the constructor does."""
        return Identity(folder, *roles) if folder else None

    def check(self, pems: Pems) -> None:
        """See `TlsFiles`."""
        wanted = " or ".join(role.value for role in self._roles)
        peers = [peer for peer in map(Peer.of, pems.uris) if peer]
        if len(pems.uris) != 1 or not peers:
            raise StartupError(
                "BAD_TLS",
                f"{self._folder / CERT} must name one URI spiffe://headrace/{wanted}/NAME; it names "
                f"{', '.join(pems.uris) or 'none'}",
            )
        if peers[0].role not in self._roles:
            problem = f"{self._folder / CERT} is of role {peers[0].role.value}; this process needs one of role {wanted}"
            raise StartupError("BAD_TLS", problem)

    def to_worker(self) -> ChannelTls:
        """Return what a new channel to a worker encrypts with."""
        return self._to(Role.DECODE)

    def call_worker(self) -> CallTls:
        """Return what a new call to a worker, on a connection of its own, encrypts with."""
        return CallTls(self.client_context(), Role.DECODE.server_name)

    def to_router(self) -> ChannelTls:
        """Return what a new channel to a router encrypts with."""
        return self._to(Role.ROUTER)

    def _to(self, role: Role) -> ChannelTls:
        pems = self.current()
        credentials = grpc.ssl_channel_credentials(pems.roots, pems.key, pems.chain)
        return ChannelTls(credentials, role.server_name)
