"""A certificate authority for development and one identity per role, as `headrace_core.identity` reads them.

    DIR/ca.crt, DIR/ca.key                     the authority; who has the key can be anybody
    DIR/router/{tls.crt, tls.key, ca.crt}      and likewise prefill/, decode/, client/, operator/

An authority that is in DIR already is used again: a second call renews the identities. Needs `cryptography`, an extra.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from headrace_core.address import parse_address
from headrace_core.errors import InvalidRequestError
from headrace_core.identity import CERT, KEY, ROOTS, Peer, Role

_CA_DAYS = 3650
_CA_KEY = "ca.key"
_CLOCKS_DIFFER = timedelta(hours=1)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def make_set(folder: Path, *, name: str, days: int, hosts: Sequence[str]) -> list[Path]:
    """Make or renew an identity called `name` for every role; return their folders.

    Args:
        folder: where to; made if need be.
        name: of the identities, among those of their role.
        days: that they are valid.
        hosts: names and addresses by which clients may know the router that bring no identity, but roots alone.

    Raises:
        InvalidRequestError: BAD_CERTIFICATE, the folder or the name can't be used.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequestError("BAD_CERTIFICATE", f"{name!r} is no name: 1 to 64 of A-Z a-z 0-9 . _ -")
    for host in hosts:
        try:
            _general_name(host)
        except ValueError:
            problem = f"{host!a} is neither a host name nor an address; write a name in ASCII, as DNS has it"
            raise InvalidRequestError("BAD_CERTIFICATE", problem) from None
    authority = Authority.open(folder)
    until = datetime.now(UTC) + timedelta(days=days)
    made: list[Path] = []
    for role in Role:
        made.append(folder / role.value)
        authority.issue(made[-1], Peer(role, name), until=until, hosts=hosts if role is Role.ROUTER else ())
    return made


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs identities."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @staticmethod
    def open(folder: Path) -> Authority:
        """Return the authority in `folder`, which is made if it is not there. Raises as `make_set`."""
        try:
            key = serialization.load_pem_private_key((folder / _CA_KEY).read_bytes(), None)
            certificate = x509.load_pem_x509_certificate((folder / ROOTS).read_bytes())
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise InvalidRequestError("BAD_CERTIFICATE", f"{folder / _CA_KEY} is not of a kind that is made here")
            return Authority(key, certificate)
        except FileNotFoundError:
            return _new_authority(folder)
        except (OSError, ValueError, TypeError) as error:
            raise InvalidRequestError("BAD_CERTIFICATE", f"can't use the authority in {folder}: {error}") from None

    def issue(
        self,
        folder: Path,
        peer: Peer,
        *,
        until: datetime,
        since: datetime | None = None,
        hosts: Sequence[str] = (),
    ) -> None:
        """Write an identity of `peer` to `folder`, over one that is there."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(peer.uri)]
        server_name = peer.role.server_name
        names += [_general_name(host) for host in (*filter(None, [server_name]), *hosts)]
        usage = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server_name else [])]
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        certificate = (
            _builder(_subject(f"headrace {peer.role.value} {peer.name}"), self.certificate.subject, key, since, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(identifier, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        _make_folder(folder)
        _write(folder / ROOTS, _pem(self.certificate))
        _write(folder / KEY, _key_pem(key))
        _write(folder / CERT, _pem(certificate))


def _new_authority(folder: Path) -> Authority:
    if (folder / ROOTS).exists():
        problem = f"{folder} has {ROOTS}, but not {_CA_KEY}: the authority's key is elsewhere, and so must this be done"
        raise InvalidRequestError("BAD_CERTIFICATE", problem)
    key, name = ec.generate_private_key(ec.SECP256R1()), _subject("headrace development authority")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key, None, datetime.now(UTC) + timedelta(days=_CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _make_folder(folder)
    _write(folder / _CA_KEY, _key_pem(key))
    _write(folder / ROOTS, _pem(certificate))
    return Authority(key, certificate)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    since: datetime | None,
    until: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(since or datetime.now(UTC) - _CLOCKS_DIFFER)
        .not_valid_after(until)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(parse_address(f"{host}:1").host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    encryption = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequestError("BAD_CERTIFICATE", f"can't make {folder}: {error.strerror}") from None


def _write(path: Path, content: bytes) -> None:
    """Write a file that its owner alone may read, in one piece: a process may be reading the one before."""
    scratch = path.with_name(f"{path.name}.new")
    scratch.unlink(missing_ok=True)
    with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    scratch.replace(path)
