"""Who calls: what requests are shared fairly by. API keys will take the bearer token's place."""

from __future__ import annotations

import hashlib
from typing import Any

from headrace_core.door import address_of
from headrace_core.shares import Caller

_AUTHORIZATION = "authorization"
_DIGEST_CHARS = 16


def authorization_of(context: Any) -> bytes:
    """Return what a call's `authorization` header says; empty if it has none."""
    sent: str | bytes = dict(context.invocation_metadata() or ()).get(_AUTHORIZATION, "")
    return sent if isinstance(sent, bytes) else sent.encode()


def caller_of(context: Any) -> Caller:
    """Return who makes a call: the bearer token, if one is sent, and the address it comes from.

    Both, because either may stand for many: everybody sends the same token to a router with `--token`, and a proxy
    gives all its callers one address. The token is hashed, as names end up in logs.
    """
    address = address_of(context)
    authorization = authorization_of(context)
    if not authorization:
        return Caller(address, address)
    return Caller(f"{hashlib.sha256(authorization).hexdigest()[:_DIGEST_CHARS]}@{address}", address)
