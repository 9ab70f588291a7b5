"""Commands that `headrace up` gives to be pasted, and the ports that it looks for."""

import shlex
import socket
import subprocess
from pathlib import Path

import pytest
from headrace_client.cluster.ports import is_free, next_free
from headrace_client.commands import hints
from headrace_client.commands.app import app
from headrace_client.commands.hints import Reached, headrace, reachable
from headrace_client.connection import DEFAULT_ADDRESS
from headrace_core.errors import NotFoundError
from headrace_core.telemetry import level_of
from headrace_core.testing.fake_router import FakeRouter
from typer.testing import CliRunner


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("0.0.0.0:8000", "127.0.0.1:8000"),
        ("[::]:8000", "[::1]:8000"),
        ("127.0.0.1:50050", "127.0.0.1:50050"),
        ("host.example:1", "host.example:1"),
    ],
)
def test_a_hint_names_what_can_be_reached(address, found):
    assert reachable(address) == found
    assert f"http://{found}/v1/completions" in Reached(DEFAULT_ADDRESS).curl(address)


def words(line: str) -> list[str]:
    return shlex.split(line)[1:]


def test_the_default_address_needs_no_option():
    assert words(Reached("0.0.0.0:50050").headrace("status")) == ["status"]
    assert words(Reached("[::]:50050").headrace("status")) == ["status", "--server", "[::1]:50050"]


def test_names_with_blanks_are_quoted_and_folders_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = Reached("0.0.0.0:50051", Path("my certs")).headrace("generate", "It's")
    identity = str(tmp_path / "my certs" / "client")
    assert words(line) == ["generate", "--server", "127.0.0.1:50051", "--identity", identity, "It's"]


def test_a_router_with_a_certificate_of_its_own_is_asked_over_tls():
    router = Reached("127.0.0.1:50051", is_encrypted=True)
    assert words(router.headrace("chat")) == ["chat", "--server", "127.0.0.1:50051", "--tls"]
    assert " https://127.0.0.1:8000/v1/completions " in router.curl("0.0.0.0:8000")


def test_a_key_is_no_argument_of_curl():
    line = Reached(DEFAULT_ADDRESS, has_keys=True).curl("127.0.0.1:8000")
    assert line.startswith('echo "authorization: Bearer $HEADRACE_API_KEY" | curl ')
    assert line.endswith(" -H @-")


def test_a_program_that_the_shell_does_not_find_is_named_by_its_place(monkeypatch):
    monkeypatch.setattr(hints.shutil, "which", lambda _: None)
    program = shlex.split(headrace("status"))[0]
    assert Path(program).is_absolute()
    assert subprocess.run([program, "--version"], capture_output=True, check=True).stdout.startswith(b"headrace ")


def test_a_failure_s_hint_reaches_the_same_router(tmp_path):
    key = tmp_path / "a key"
    key.write_text("sesame")
    options = ["--api-key-file", str(key)]
    with FakeRouter([NotFoundError("UNKNOWN_MODEL", "no model nope")]) as router:
        line = ["generate", "Tell", "--model", "nope", "-s", router.address, *options]
        result = CliRunner().invoke(app, line, catch_exceptions=False)
    assert result.exit_code == 2
    assert words(result.stderr.split("`")[1]) == ["status", "--server", router.address, *options]


def test_the_next_free_port_is_found_in_rows():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert not is_free(port)
        assert next_free(port) != port
        assert port not in range(next_free(port - 1, 3), next_free(port - 1, 3) + 3)
    assert next_free(70_000) == 0


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("12:34:56.789 I serving role=router", "INFO"),
        ("12:34:56.789 W few files may be opened", "WARNING"),
        ('{"time": 1.5, "level": "ERROR", "event": "failed"}', "ERROR"),
        ('{"time": cut short', ""),
        ("Traceback (most recent call last):", ""),
        ("", ""),
    ],
)
def test_the_level_of_a_line_is_read_back(line, level):
    assert level_of(line) == level
