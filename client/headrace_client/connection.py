"""Where a router is, how to reach it safely, and what a failed connection means."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from headrace_core.errors import (
    DeadlineError,
    HeadraceError,
    InvalidRequestError,
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

# What gRPC says of a handshake that failed, which is little.
_TLS_CAUSES = {
    "Socket closed": "it closed the connection; does it ask for TLS, or for a certificate (--tls, --identity)?",
    "Hostname Verification Check failed": "its certificate is another's",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of an authority that is trusted here, or has expired",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
}

# What gRPC says of a call that this side cancelled.
_OWN_CANCELS = ("Locally cancelled by application!", "Channel closed!")


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


def error_from(error: grpc.RpcError, address: str, *, has_answer: bool = False) -> HeadraceError:
    """Return the error to raise; what failed without a word from the router says so in words for people.

    A connection that failed becomes UNREACHABLE, or CONNECTION_LOST when a part of the answer had come; so does a call
    that gRPC itself cancelled at the router. A message that gRPC refused for its size becomes PROMPT_TOO_LONG.
    """
    raised = raised_from(error)
    if raised.reason == grpc.StatusCode.UNAVAILABLE.name:
        cause = cause_of(str(raised))
        if has_answer:
            return UnavailableError("CONNECTION_LOST", f"the connection to the router at {address} was lost: {cause}")
        return UnavailableError("UNREACHABLE", f"no connection to a router at {address}: {cause}")
    if error.code() is grpc.StatusCode.CANCELLED and error.details() not in _OWN_CANCELS:
        return UnavailableError("CONNECTION_LOST", f"the router at {address} dropped the call without a word")
    if raised.reason == grpc.StatusCode.RESOURCE_EXHAUSTED.name and "larger than max" in str(raised):
        return InvalidRequestError("PROMPT_TOO_LONG", f"the request is larger than the router takes: {raised}")
    if raised.reason == grpc.StatusCode.DEADLINE_EXCEEDED.name:
        return DeadlineError(raised.reason, "the time limit passed before the answer was complete")
    return raised


def cause_of(details: str) -> str:
    """Return a transport failure's cause without what gRPC puts before it."""
    cause = _TRANSPORT_PREFIX.sub("", details)
    return next((words for said, words in _TLS_CAUSES.items() if said in cause), cause)
