"""The PEM files that a process proves itself with: checked when they are read, and read again when they change.

They are checked by a handshake of the process with itself, in memory, so that what a peer would refuse later is told
at the start, in a line. Files that changed for the worse are logged, and those read before are kept. Any thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from headrace_core.errors import StartupError

log = logging.getLogger(__name__)

_PROBLEMS = {
    "KEY_VALUES_MISMATCH": "{key} is not the key of {cert}",
    "BAD_PASSWORD_READ": "{key} is encrypted; a process can't ask for its passphrase",
    "certificate has expired": "{cert}, or what signed it, has expired: renew it",
    "certificate is not yet valid": "{cert}, or what signed it, is not valid yet: is this machine's clock right?",
    "unsuitable certificate purpose": "{cert} must allow clientAuth, and serverAuth where it serves",
}
_UNSIGNED = "{cert} is not signed by {roots}"
_UNREADABLE = "{cert} and {key} are not a PEM certificate and its private key, or {roots} is no PEM certificate"
_READ_TRIES = 3


@dataclass(frozen=True, slots=True)
class Pems:
    """What the files hold."""

    chain: bytes
    key: bytes = field(repr=False)
    roots: bytes | None
    uris: Sequence[str]
    """Whom the certificate names."""


class TlsFiles:
    """A certificate with its key and, where both sides show one, the authority that signs the others'."""

    def __init__(self, cert: Path, key: Path, roots: Path | None = None, *, server_name: str = "") -> None:
        """Read and check. `server_name`: what the certificate must serve as; empty: nothing.

        Raises:
            StartupError: BAD_TLS, says what is wrong with which file.
        """
        self._cert, self._key, self._roots = cert, key, roots
        self._server_name = server_name
        self._lock = threading.Lock()
        self._calling: tuple[Pems, ssl.SSLContext] | None = None
        """What was called with last, and of which files' content it was made."""
        self._stamp = self._look()
        self._pems = self._read()

    def current(self) -> Pems:
        """Return what the files hold, or held when they were last in order."""
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._pems = self._read()
                    log.info("read a new certificate", extra={"path": str(self._cert)})
                except StartupError as error:
                    log.error("can't use the new certificate; the one before is kept", extra={"problem": str(error)})
            return self._pems

    def check(self, pems: Pems) -> None:
        """Look at what was read; whoever needs more of a certificate refuses it here.

        Raises:
            StartupError: BAD_TLS.
        """

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow the files; with `roots` whoever connects must show a certificate, too."""
        used = self.current()

        def configuration() -> Any:
            return grpc.ssl_server_certificate_configuration([(used.key, used.chain)], used.roots)

        def newer() -> Any:
            nonlocal used
            pems = self.current()
            if pems is used:
                return None
            used = pems
            return configuration()

        return grpc.dynamic_ssl_server_credentials(
            configuration(), newer, require_client_authentication=self._roots is not None
        )

    def server_context(self) -> ssl.SSLContext:
        """Return what `ssl` serves with, which follows the files and asks for certificates as the credentials do."""
        used, context = self.current(), self._context()

        def follow(connection: Any, name: str | None, first: ssl.SSLContext) -> None:
            nonlocal used, context
            del name, first
            pems = self.current()
            if pems is not used:
                with contextlib.suppress(
                    OSError, ssl.SSLError
                ):  # replaced once more meanwhile: the next one's business
                    context, used = self._context(), pems
            connection.context = context

        outer = self._context()
        outer.sni_callback = follow  # called in every handshake, with a name or without
        return outer

    def client_context(self) -> ssl.SSLContext:
        """Return what `ssl` calls a server of HTTP/2 with: of files in order, or of those that were it last."""
        pems = self.current()
        if self._calling is None or self._calling[0] is not pems:
            try:
                self._calling = pems, self._client_context()
            except (OSError, ssl.SSLError):  # replaced once more meanwhile: the next one's business
                if self._calling is None:
                    raise
        return self._calling[1]

    def _client_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(self._cert, self._key, password=_no_passphrase)
        context.load_verify_locations(self._roots)
        return context

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self._cert, self._key, password=_no_passphrase)
        if self._roots is not None:
            context.load_verify_locations(self._roots)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _look(self) -> tuple[Any, ...]:
        """Return what changes when a file does."""
        stamps: list[Any] = []
        for path in filter(None, (self._cert, self._key, self._roots)):
            try:
                found = os.stat(path)
                stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
            except OSError as error:
                stamps.append(error.errno)
        return tuple(stamps)

    def _read(self) -> Pems:
        """Read until no file is replaced meanwhile: those of a moment belong together."""
        for _ in range(_READ_TRIES - 1):
            before = self._look()
            with contextlib.suppress(StartupError):
                pems = self._read_once()
                if self._look() == before:
                    return pems
        return self._read_once()

    def _read_once(self) -> Pems:
        try:
            chain, key = self._cert.read_bytes(), self._key.read_bytes()
            roots = self._roots.read_bytes() if self._roots else None
            pems = Pems(chain, key, roots, self._shake_hands())
            self.check(pems)
            if self._server_name:
                self._shake_hands(self._server_name)
            return pems
        except ssl.SSLError as error:
            raise StartupError("BAD_TLS", self._problem(error)) from None
        except OSError as error:
            problem = f"can't read {error.filename}: {error.strerror}; `headrace certs` makes a set for development"
            raise StartupError("BAD_TLS", problem) from None

    def _shake_hands(self, server_name: str = "") -> Sequence[str]:
        """Let the certificate prove itself to itself, as client or, with a name, as server, too; return its URIs."""
        roots = self._roots or self._cert
        near, far = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for side in (near, far):
            side.load_cert_chain(self._cert, self._key, password=_no_passphrase)
            side.load_verify_locations(roots)
        if self._roots is None:  # a certificate whose signer is the clients' business: its dates are looked at alone
            near.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
            near.check_hostname = False
        else:
            far.verify_mode = ssl.CERT_REQUIRED
            if not server_name:
                near.check_hostname, near.verify_mode = False, ssl.CERT_NONE
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = near.wrap_bio(back, there, server_hostname=server_name or None)
        server = far.wrap_bio(there, back, server_side=True)
        waiting = [client, server]
        while waiting:
            for end in list(waiting):
                try:
                    end.do_handshake()
                    waiting.remove(end)
                except ssl.SSLWantReadError:
                    pass
        names: Any = (server.getpeercert() or {}).get("subjectAltName", ())
        return [name for kind, name in names if kind == "URI"]

    def _problem(self, error: ssl.SSLError) -> str:
        said = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason or ""
        if "Hostname mismatch" in said:
            text = "{cert} is not for a process that serves as " + self._server_name
        elif isinstance(error, ssl.SSLCertVerificationError):
            text = _PROBLEMS.get(said, _UNSIGNED)
        else:
            text = _PROBLEMS.get(said, _UNREADABLE)
        return text.format(cert=self._cert, key=self._key, roots=self._roots or self._cert)


def _no_passphrase() -> str:
    return ""
