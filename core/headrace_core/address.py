"""Where a process listens, as somebody wrote it down: in a setting, a line of a file, or an answer of DNS.

What passes here is plain ASCII in one spelling, so neither gRPC nor a resolver can choke on it, and two spellings of
one address are one worker.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from dataclasses import dataclass

_PORT = re.compile(r"[0-9]{1,5}")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_SCOPE = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_MOST_HOST_CHARS = 253
_MOST_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Address:
    """`host` is an IPv4 address, an IPv6 address without brackets, `localhost`, or a DNS name."""

    host: str
    port: int

    @property
    def is_name(self) -> bool:
        """True if DNS says which hosts are meant; `localhost` is one host."""
        return self.host != "localhost" and not (":" in self.host or _is_ipv4(self.host))

    @property
    def is_loopback(self) -> bool:
        """True if it can't be another machine's."""
        return self.host == "localhost" or (not self.is_name and ipaddress.ip_address(self.host).is_loopback)

    def __str__(self) -> str:
        """Return `host:port`, as gRPC takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, *, least_port: int = 1) -> Address:
    """Return what `host:port` names; port 0 can be listened on, and nobody can be reached there.

    Raises:
        ValueError: it is no such thing; says why, in a line of ASCII.
    """
    host, colon, port = text.rpartition(":")
    if not (colon and host):
        raise ValueError(f"{_shown(text)} is not host:port")
    if not _PORT.fullmatch(port) or not least_port <= int(port) < 65536:
        raise ValueError(f"{_shown(text)} is not host:port with a port from {least_port} to 65535")
    if host.startswith("[") and host.endswith("]"):
        return Address(_ipv6(host[1:-1]), int(port))
    if ":" in host:
        raise ValueError(f"{_shown(text)} is not host:port; an IPv6 address stands in brackets, as in [::1]:50051")
    return Address(host if _is_ipv4(host) else _name(host), int(port))


def is_loopback(text: str) -> bool:
    """Return whether what gRPC is to listen on or to call can't be another machine's."""
    try:
        return parse_address(text, least_port=0).is_loopback
    except ValueError:
        return text.startswith("unix:")


def _ipv6(host: str) -> str:
    address, percent, scope = host.partition("%")
    try:
        compressed = str(ipaddress.IPv6Address(address))
    except ValueError:
        raise ValueError(f"{_shown(host)} is no IPv6 address") from None
    if percent and not _SCOPE.fullmatch(scope):
        raise ValueError(f"{_shown(scope)} is no name of an interface")
    return compressed + percent + scope


def _name(host: str) -> str:
    name = ""
    if len(host) <= _MOST_HOST_CHARS:
        with contextlib.suppress(UnicodeError):
            name = host.encode("idna").decode("ascii").lower()
    labels = name.removesuffix(".").split(".")
    # A last label of digits alone is an IPv4 address mistyped, and resolvers guess at it.
    is_name = all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdecimal()
    if not is_name or len(name) > _MOST_HOST_CHARS:
        raise ValueError(f"{_shown(host)} is neither a host name nor an IPv4 address")
    return name


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _shown(text: str) -> str:
    return ascii(text if len(text) <= _MOST_SHOWN_CHARS else text[:_MOST_SHOWN_CHARS] + "...")
