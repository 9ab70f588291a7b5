"""Who calls a router without keys: what requests are shared fairly by. `keys.py` is for one that has some."""

from __future__ import annotations

import hashlib
from typing import Any

from headrace_core.authority import caller_uri
from headrace_core.door import address_of
from headrace_core.shares import Caller

_AUTHORIZATION = "authorization"
_DIGEST_CHARS = 16


def authorization_of(context: Any) -> bytes:
    """Return what a call's `authorization` header says; empty if it has none."""
    sent: str | bytes = dict(context.invocation_metadata() or ()).get(_AUTHORIZATION, "")
    return sent if isinstance(sent, bytes) else sent.encode()


def caller_of(context: Any, *, is_asked: bool = False) -> Caller:
    """Return who makes a call: whom its certificate names; else the token it may send, and the address it comes from.

    Both, because either may stand for many: a token may be made up, and a proxy gives all its callers one address. It
    is hashed, as names end up in logs. Where callers are asked for keys (`is_asked`) one that is not ours says nothing.
    """
    uri = caller_uri(context)
    if uri:
        return Caller(uri, uri)
    address = address_of(context)
    authorization = b"" if is_asked else authorization_of(context)
    if not authorization:
        return Caller(address, address)
    return Caller(f"{hashlib.sha256(authorization).hexdigest()[:_DIGEST_CHARS]}@{address}", address)
