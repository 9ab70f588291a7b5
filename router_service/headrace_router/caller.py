"""Who calls: what requests are shared fairly by. API keys will take the bearer token's place."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

_AUTHORIZATION = "authorization"
_DIGEST_CHARS = 16


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call."""

    name: str
    """Whose share it is; the address, unless the caller says more of itself."""
    address: str
    """The host it calls from, without port."""


def caller_of(context: Any) -> Caller:
    """Return who makes a call: the bearer token, if one is sent, and the address it comes from.

    Both, because either may stand for many: everybody sends the same token to a router with `--token`, and a proxy
    gives all its callers one address. The token is hashed, as names may end up in logs.
    """
    address = _address_of(unquote(context.peer()))
    sent: str | bytes = dict(context.invocation_metadata() or ()).get(_AUTHORIZATION, "")
    authorization = sent if isinstance(sent, bytes) else sent.encode()
    if not authorization:
        return Caller(address, address)
    return Caller(f"{hashlib.sha256(authorization).hexdigest()[:_DIGEST_CHARS]}@{address}", address)


def _address_of(peer: str) -> str:
    """Return the host of gRPC's name for a peer: `ipv4:10.0.0.7:40122`, `ipv6:[::1]:40122`, `unix:/path`."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
