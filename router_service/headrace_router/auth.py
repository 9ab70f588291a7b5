"""Who may call: TLS credentials and the bearer token."""

from __future__ import annotations

import hmac
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import grpc
from headrace_core.door import Call, Guard
from headrace_core.errors import StartupError, UnauthenticatedError

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


def server_credentials(cert: Path | None, key: Path | None) -> grpc.ServerCredentials | None:
    """Return credentials from PEM files; None if neither is given.

    Raises:
        StartupError: BAD_TLS, one is missing or can't be read.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise StartupError("BAD_TLS", "--tls-cert and --tls-key come together")
    try:
        pair = (key.read_bytes(), cert.read_bytes())
    except OSError as error:
        raise StartupError("BAD_TLS", f"can't read the TLS files: {error}") from error
    return grpc.ssl_server_credentials([pair])
