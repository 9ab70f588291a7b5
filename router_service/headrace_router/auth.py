"""Who may call: TLS credentials and the bearer token."""

from __future__ import annotations

import hmac
from collections.abc import Generator
from contextlib import contextmanager

from headrace_core.authority import ServerTls
from headrace_core.config import RouterSettings
from headrace_core.door import Call, Guard
from headrace_core.errors import StartupError, UnauthenticatedError
from headrace_core.identity import Identity, Role
from headrace_core.tls_files import TlsFiles

from headrace_router.caller import authorization_of

_PROTECTED = "/headrace."
"""Health and reflection stay open: probes have no token."""


def token_guard(token: str) -> Guard:
    """Return the guard that refuses calls of our own services without `authorization: Bearer <token>`."""
    expected = f"Bearer {token}".encode()

    @contextmanager
    def guard(call: Call) -> Generator[None]:
        if call.method.startswith(_PROTECTED) and not hmac.compare_digest(authorization_of(call.context), expected):
            raise UnauthenticatedError(
                "BAD_TOKEN_AUTH", "send the router's token as metadata `authorization: Bearer <token>`"
            )
        yield

    return guard


def front(settings: RouterSettings, identity: Identity | None) -> ServerTls | None:
    """Return how clients reach the router: by a certificate of its own, which asks none of them, or by its identity.

    Who shows no certificate has the role of a client: its key says who it is.

    Raises:
        StartupError: BAD_TLS.
    """
    if settings.tls_cert is None and settings.tls_key is None:
        return ServerTls(identity, Role.ROUTER) if identity else None
    if settings.tls_cert is None or settings.tls_key is None:
        raise StartupError("BAD_TLS", "--tls-cert and --tls-key come together")
    return ServerTls(TlsFiles(settings.tls_cert, settings.tls_key), Role.ROUTER, anonymous=Role.CLIENT)
