"""Who may call what: a table of rpcs and roles, asked of every call before its message is read.

What is not in the table may be called by nobody. Without TLS nobody is known, and nobody is asked: for one machine. But
who drains a worker must then call from its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace_core.door import Call, is_local
from headrace_core.errors import PermissionDeniedError, UnauthenticatedError
from headrace_core.identity import WORKERS, Peer, Role
from headrace_core.tls_files import TlsFiles

_SPIFFE_ID = "peer_spiffe_id"
"""grpc's property for the one URI of a certificate that the handshake has verified."""
_ANYONE = frozenset(Role)
_USERS = frozenset({Role.CLIENT, Role.OPERATOR})
_WATCHERS = frozenset({Role.ROUTER, Role.OPERATOR})
_OPERATORS = frozenset({Role.OPERATOR})

_DRAIN = "/headrace.v1.WorkerService/Drain"

CALLERS: Mapping[str, frozenset[Role]] = {
    "/headrace.v1.GenerationService/Generate": _USERS,
    "/headrace.v1.GenerationService/GetServerInfo": _USERS,
    "/headrace.v1.DecodeService/Session": frozenset({Role.ROUTER}),
    "/headrace.v1.HoldService/Hold": WORKERS,
    "/headrace.v1.TransferService/Pull": WORKERS,
    "/headrace.v1.WorkerService/GetInfo": _WATCHERS,
    "/headrace.v1.WorkerService/WatchLoad": _WATCHERS,
    _DRAIN: _OPERATORS,
    "/grpc.health.v1.Health/Check": _ANYONE,
    "/grpc.health.v1.Health/List": _ANYONE,
    "/grpc.health.v1.Health/Watch": _ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _OPERATORS,
}
"""Roles that may call an rpc, by its full name. Of a worker a client may call none, whatever stands here."""


def caller_uri(context: Any) -> str:
    """Return whom the certificate of a call's caller names, as its handshake verified it; empty without one."""
    named: list[bytes] = context.auth_context().get(_SPIFFE_ID, [])
    return named[0].decode("utf-8", "replace") if len(named) == 1 else ""


def guard_without_tls(call: Call) -> None:
    """Let a call pass or raise, where nobody is known; a `door.Guard`.

    Raises:
        UnauthenticatedError: NO_IDENTITY, a worker is drained by who calls from its own machine alone.
    """
    if call.method == _DRAIN and not is_local(call.context):
        problem = "without --tls a worker is drained from its own machine alone; send it SIGTERM, or give it --tls"
        raise UnauthenticatedError("NO_IDENTITY", problem)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """How a server is reached: its certificate, as whom it serves, who asks it without one (None: nobody may)."""

    files: TlsFiles
    serves_as: Role
    anonymous: Role | None = None

    def guard(self, call: Call) -> None:
        """Let a call pass or raise; a `door.Guard`.

        Raises:
            UnauthenticatedError: NO_IDENTITY, its caller's certificate names nobody of ours.
            PermissionDeniedError: WRONG_ROLE, its caller's role may not call this.
        """
        role = self._role_of(caller_uri(call.context))
        roles = CALLERS.get(call.method, frozenset[Role]())
        if self.serves_as in WORKERS:
            roles -= {Role.CLIENT}
        if role not in roles:
            who = ", ".join(sorted(each.value for each in roles)) or "nobody"
            raise PermissionDeniedError(
                "WRONG_ROLE", f"the role {role.value} may not call {call.method} of a {self.serves_as.value}; {who} may"
            )

    def _role_of(self, uri: str) -> Role:
        peer = Peer.of(uri)
        if peer is not None:
            return peer.role
        if uri or self.anonymous is None:
            problem = f"the certificate names {uri or 'nobody'}; it must name one spiffe://headrace/ROLE/NAME"
            raise UnauthenticatedError("NO_IDENTITY", problem)
        return self.anonymous
