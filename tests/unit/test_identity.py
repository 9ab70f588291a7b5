"""What a certificate must say, and what is told of one that says something else."""

import shutil
import sys
from datetime import UTC, datetime, timedelta

import pytest
from headrace_client.certificates import Authority
from headrace_client.commands.app import app
from headrace_client.commands.certs import make
from headrace_core.errors import InvalidRequestError, StartupError
from headrace_core.identity import CERT, KEY, ROOTS, Identity, Peer, Role
from headrace_core.tls_files import TlsFiles
from typer.testing import CliRunner

SERVING = (Role.ROUTER, Role.PREFILL, Role.DECODE)
A = Peer(Role.DECODE, "a")
NOW, DAY = datetime.now(UTC), timedelta(days=1)


@pytest.fixture
def folder(tmp_path, identities):
    """A decode worker's identity, to be spoilt."""
    shutil.copytree(identities / "decode", tmp_path / "decode")
    return tmp_path / "decode"


def issue(identities, folder, peer=A, *, since=None, until=NOW + DAY):
    Authority.open(identities).issue(folder, peer, since=since, until=until)


def problem(folder, *roles):
    with pytest.raises(StartupError) as caught:
        Identity(folder, *(roles or (Role.DECODE,)))
    assert caught.value.reason == "BAD_TLS"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("role", Role)
def test_a_set_has_an_identity_for_every_role(identities, role):
    uris = Identity(identities / role.value, role).current().uris
    assert [Peer.of(uri) for uri in uris] == [Peer(role, "dev")]


def test_keys_are_for_their_owner_alone(identities):
    assert {path.stat().st_mode & 0o777 for path in identities.glob("**/*.key")} == {0o600}


def test_no_private_key_is_shown(identities):
    assert "PRIVATE" not in repr(Identity(identities / "decode", Role.DECODE).current())


@pytest.mark.parametrize("name", [CERT, KEY, ROOTS])
def test_a_file_that_is_missing_is_named(folder, name):
    (folder / name).unlink()
    assert f"{folder / name}: No such file" in problem(folder)


@pytest.mark.parametrize("name", [CERT, KEY, ROOTS])
def test_a_file_that_is_no_pem_is_refused(folder, name):
    (folder / name).write_text("nonsense")
    assert "not a PEM certificate" in problem(folder)


def test_another_certificates_key_is_refused(folder, identities):
    shutil.copy(identities / "prefill" / KEY, folder / KEY)
    assert f"{folder / KEY} is not the key of {folder / CERT}" in problem(folder)


def test_an_expired_certificate_is_refused(folder, identities):
    issue(identities, folder, since=NOW - 2 * DAY, until=NOW - DAY)
    assert "has expired" in problem(folder)


def test_a_certificate_of_tomorrow_is_refused(folder, identities):
    issue(identities, folder, since=NOW + DAY, until=NOW + 2 * DAY)
    assert "is not valid yet" in problem(folder)


def test_a_certificate_of_another_authority_is_refused(folder, tmp_path):
    make(tmp_path / "other")
    shutil.copy(tmp_path / "other" / ROOTS, folder / ROOTS)
    assert f"is not signed by {folder / ROOTS}" in problem(folder)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("wanted", SERVING)
def test_a_certificate_of_another_role_is_refused(identities, role, wanted):
    if role is wanted:
        Identity(identities / role.value, wanted)
    else:
        said = problem(identities / role.value, wanted)
        assert f"is of role {role.value}; this process needs one of role {wanted.value}" in said


def test_a_worker_that_can_not_serve_is_refused(folder, identities, monkeypatch):
    monkeypatch.setattr(Role, "server_name", property(lambda _: "router.headrace.internal"))
    issue(identities, folder)
    monkeypatch.undo()
    assert "not for a process that serves as worker.headrace.internal" in problem(folder)


def test_a_client_may_be_a_client_or_an_operator(identities):
    for role in (Role.CLIENT, Role.OPERATOR):
        Identity(identities / role.value, Role.CLIENT, Role.OPERATOR)
    assert "needs one of role client or operator" in problem(identities / "router", Role.CLIENT, Role.OPERATOR)


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://headrace/decode",
        "spiffe://headrace/decode/",
        "spiffe://headrace/root/a",
        "spiffe://elsewhere/decode/a",
        "https://headrace/decode/a",
        "spiffe://headrace/decode/a/b",
        "spiffe://headrace/decode/a\n",
        " spiffe://headrace/decode/a",
        "spiffe://headrace/DECODE/a",
        f"spiffe://headrace/decode/{'a' * 65}",
        "",
    ],
)
def test_a_uri_that_is_not_ours_names_nobody(uri):
    assert Peer.of(uri) is None


def test_a_uri_names_role_and_name():
    peer = Peer.of("spiffe://headrace/prefill/rack-3.a_b")
    assert peer == Peer(Role.PREFILL, "rack-3.a_b")
    assert Peer.of(peer.uri) == peer


def test_new_files_are_read_and_bad_ones_are_not(folder, identities, caplog):
    identity = Identity(folder, Role.DECODE)
    first = identity.current()
    assert identity.current() is first
    issue(identities, folder, Peer(Role.DECODE, "b"))
    second = identity.current()
    assert second.uris == ["spiffe://headrace/decode/b"]
    (folder / CERT).write_text("nonsense")
    assert identity.current() is second
    assert identity.current() is second
    assert [record.levelname for record in caplog.records if record.levelname != "INFO"] == ["ERROR"]  # told once
    issue(identities, folder, Peer(Role.CLIENT, "b"))
    assert identity.current() is second
    issue(identities, folder, Peer(Role.DECODE, "c"))
    assert identity.current().uris == ["spiffe://headrace/decode/c"]


def test_a_front_certificate_needs_no_authority_but_its_key_and_its_time(folder, identities):
    assert TlsFiles(folder / CERT, folder / KEY).current().roots is None
    issue(identities, folder, since=NOW - 2 * DAY, until=NOW - DAY)
    with pytest.raises(StartupError, match="has expired"):
        TlsFiles(folder / CERT, folder / KEY)


def test_a_second_set_has_the_same_authority(tmp_path):
    make(tmp_path, name="one")
    roots = (tmp_path / ROOTS).read_bytes()
    make(tmp_path, name="two")
    assert (tmp_path / ROOTS).read_bytes() == roots
    assert Identity(tmp_path / "client", Role.CLIENT).current().uris == ["spiffe://headrace/client/two"]


def test_an_authority_without_its_key_is_not_made_anew(tmp_path):
    make(tmp_path)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(InvalidRequestError, match=r"not ca\.key"):
        make(tmp_path)


def test_the_command_makes_a_set_and_says_where(tmp_path):
    result = CliRunner().invoke(app, ["certs", str(tmp_path / "certs"), "--name", "rack-3", "--days", "1"])
    assert result.exit_code == 0
    assert result.stdout.split() == [str(tmp_path / "certs" / role.value) for role in Role]
    uris = Identity(tmp_path / "certs" / "prefill", Role.PREFILL).current().uris
    assert uris == ["spiffe://headrace/prefill/rack-3"]


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b"])
def test_a_name_that_can_not_be_in_a_uri_makes_nothing(tmp_path, name):
    result = CliRunner().invoke(app, ["certs", str(tmp_path / "certs"), "--name", name])
    assert result.exit_code == 2
    assert not (tmp_path / "certs").exists()


def test_without_cryptography_the_command_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "headrace_client.certificates", None)
    result = CliRunner().invoke(app, ["certs", str(tmp_path)])
    assert result.exit_code == 1
    assert "pip install 'headrace[certs]'" in result.stderr
