"""Where a router is, how to reach it safely, and what a failed connection means."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from headrace_core.errors import DeadlineError, HeadraceError, InvalidRequestError, UnavailableError
from headrace_core.rpc import raised_from

from headrace_client.retry import RetryPolicy

DEFAULT_ADDRESS = "127.0.0.1:50050"
INFO_TIMEOUT_S = 10.0
"""Longest wait for an answer that needs no worker."""

# What gRPC puts before the cause: "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:50050: ".
_TRANSPORT_PREFIX = re.compile(r"^.*last error: (\w+: )?(ipv[46]:\S+: )?")

# What gRPC says of a call that this side cancelled.
_OWN_CANCELS = ("Locally cancelled by application!", "Channel closed!")


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How to talk to a router.

    `use_tls` encrypts and checks the router's certificate against the system's roots, or against the PEM file
    `root_certificates`, which turns TLS on by itself. `token` is sent as a bearer token with every call; without TLS it
    travels in the clear.
    """

    use_tls: bool = False
    root_certificates: Path | None = None
    token: str = field(default="", repr=False)
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Return what a channel needs; None without TLS.

        Raises:
            InvalidRequestError: BAD_CERTIFICATE, the file of roots can't be read.
        """
        if not self.use_tls and self.root_certificates is None:
            return None
        return grpc.ssl_channel_credentials(self._roots())

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what is sent with every call.

        Raises:
            InvalidRequestError: BAD_CREDENTIALS, the token can't be sent.
        """
        if not (self.token.isascii() and self.token.isprintable()):
            raise InvalidRequestError("BAD_CREDENTIALS", "the token holds characters that a header can't carry")
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

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
    return _TRANSPORT_PREFIX.sub("", details)
