"""Where a router is, how to reach it safely, and what a failed connection means."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from headrace_core.errors import (
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    StartupError,
    UnavailableError,
)
from headrace_core.identity import ChannelTls, Identity, Role
from headrace_core.rpc import raised_from

from headrace_client.retry import RetryPolicy
from headrace_client.tracing import trace_metadata

DEFAULT_ADDRESS = "127.0.0.1:50050"
INFO_TIMEOUT_S = 10.0
"""Longest wait for an answer that needs no worker."""

# What gRPC puts before the cause: "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:50050: ".
_TRANSPORT_PREFIX = re.compile(r"^.*last error: (\w+: )?(ipv[46]:\S+: )?")

# What gRPC says of a connection that did not come about, which is little, and what it is for the caller.
_CAUSES = {
    "Socket closed": "it closed the connection; does it ask for TLS, or for a certificate (--tls, --identity)?",
    "Hostname Verification Check failed": "its certificate is another's",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of an authority that is trusted here (--tls-roots), or has "
    "expired",
    "WRONG_VERSION_NUMBER": "it does not speak TLS; if it is the router, leave out --tls, --tls-roots and --identity",
    "Failed parsing HTTP/2": "what answers there is no gRPC server: is it the port of metrics, or another program's?",
    "address lookup failed": "the name of the host can't be resolved",
    "errors resolving": "the name of the host can't be resolved",
}


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How to talk to a router.

    `use_tls` encrypts and checks the router's certificate against the system's roots, or against the PEM file
    `root_certificates`, which turns TLS on by itself. `identity` is a folder with a certificate of role client or
    operator (`headrace certs` makes some) for a router that asks for one; the router must then show one of role router,
    whatever its address. `api_key` is sent with every call; without TLS it travels in the
    clear.
    """

    use_tls: bool = False
    root_certificates: Path | None = None
    identity: Path | None = None
    api_key: str = field(default="", repr=False)
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def tls(self) -> ChannelTls | None:
        """Return what a channel encrypts with; None without TLS.

        Raises:
            InvalidRequestError: BAD_CERTIFICATE, the file of roots or the identity can't be used; says why.
        """
        if self.identity is not None:
            try:
                return Identity(self.identity, Role.CLIENT, Role.OPERATOR).to_router()
            except StartupError as error:
                raise InvalidRequestError("BAD_CERTIFICATE", str(error)) from None
        if not self.use_tls and self.root_certificates is None:
            return None
        return ChannelTls(grpc.ssl_channel_credentials(self._roots()))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what is sent with a call now: the API key, and the trace that the caller is in.

        Raises:
            InvalidRequestError: BAD_CREDENTIALS, the key can't be sent.
        """
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InvalidRequestError("BAD_CREDENTIALS", "the API key holds characters that a header can't carry")
        authorization = (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()
        return (*authorization, *trace_metadata())

    def _roots(self) -> bytes | None:
        if self.root_certificates is None:
            return None
        try:
            roots = self.root_certificates.read_bytes()
        except OSError as error:
            raise InvalidRequestError(
                "BAD_CERTIFICATE", f"can't read the root certificates {self.root_certificates}: {error.strerror}"
            ) from None
        if b"-----BEGIN CERTIFICATE-----" not in roots:
            raise InvalidRequestError("BAD_CERTIFICATE", f"{self.root_certificates} holds no PEM certificate")
        return roots


@dataclass(slots=True)
class Connection:
    """What a client and its streams know together: where the router is, how it is reached, whether it still is."""

    address: str
    options: ConnectionOptions
    is_closed: bool = False
    """True once the client was closed."""

    def check_open(self) -> None:
        """Let nothing be sent by a closed client.

        Raises:
            InvalidRequestError: CLIENT_CLOSED.
        """
        if self.is_closed:
            raise InvalidRequestError("CLIENT_CLOSED", f"this client of the router at {self.address} was closed")

    def error_from(self, error: grpc.RpcError, *, has_answer: bool = False) -> HeadraceError:
        """Return the error to raise; what failed without a word from the router says so in words for people.

        A connection that failed becomes UNREACHABLE, or CONNECTION_LOST when a part of the answer had come; so does a
        call that was cancelled by others than this client's user, such as a router that ends or a proxy. A message that
        gRPC refused for its size becomes PROMPT_TOO_LONG; a server that has no such method, NOT_A_ROUTER.

        Raises:
            InvalidRequestError: CLIENT_CLOSED, that is why.
        """
        self.check_open()
        raised = raised_from(error)
        code, details = error.code(), str(raised)
        if code is grpc.StatusCode.CANCELLED:
            return UnavailableError("CONNECTION_LOST", f"the router at {self.address} dropped the call: {details}")
        if raised.reason != code.name:  # the router's own word
            return raised
        if code is grpc.StatusCode.UNAVAILABLE:
            cause = cause_of(details)
            if has_answer:
                problem = f"the connection to the router at {self.address} was lost: {cause}"
                return UnavailableError("CONNECTION_LOST", problem)
            return UnavailableError("UNREACHABLE", f"no connection to a router at {self.address}: {cause}")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            problem = f"{self.address} is no router: a worker answers there, or another gRPC server; give the router's"
            return NotFoundError("NOT_A_ROUTER", f"{problem} address")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
            return InvalidRequestError("PROMPT_TOO_LONG", f"the request is larger than the router takes: {details}")
        return raised


def cause_of(details: str) -> str:
    """Return a transport failure's cause without what gRPC puts before it."""
    cause = _TRANSPORT_PREFIX.sub("", details)
    return next((words for said, words in _CAUSES.items() if said in cause), cause)
