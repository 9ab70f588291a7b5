"""How clients reach the router: by which certificate, and who they are without one."""

from __future__ import annotations

from headrace_core.authority import ServerTls
from headrace_core.config import RouterSettings
from headrace_core.errors import StartupError
from headrace_core.identity import Identity, Role
from headrace_core.tls_files import TlsFiles


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
