"""docs/client.md, Exit codes: of every subcommand and process what goes wrong, its code, and the line that says it."""

import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from headrace_client.commands.app import app
from headrace_core.errors import NotFoundError
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.fake_router import FakeRouter
from typer.testing import CliRunner

ASKING = {
    "generate": ["generate", "Tell"],
    "chat": ["chat"],
    "status": ["status"],
    "top": ["top", "--once"],
    "experts": ["experts"],
    "bench": ["bench", "--num-requests", "2"],
}
"""Whatever asks a router."""


def run(*arguments: object, **options):
    line = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, line, catch_exceptions=False, env={"COLUMNS": "300"}, **options)


def check(result, code: int, says: str) -> None:
    """A line of an error on standard error, perhaps one of what to do, and nothing on standard output."""
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    first, *more = [line for line in result.stderr.splitlines() if not line.startswith("waiting: ")]
    assert first.startswith("error: ")
    assert says in first
    assert len(more) <= 1, result.stderr


@contextmanager
def no_router():
    """A gRPC server that is no router, as a worker is none."""
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("command", ASKING.values(), ids=ASKING)
def test_no_router_there_is_1(command):
    check(run(*command, "-s", "127.0.0.1:1"), 1, "no connection to a router at 127.0.0.1:1")


@pytest.mark.parametrize("command", ASKING.values(), ids=ASKING)
def test_something_else_there_is_2(command):
    with no_router() as address:
        check(run(*command, "-s", address), 2, f"{address} is no router")


@pytest.mark.parametrize("command", ASKING.values(), ids=ASKING)
def test_no_address_is_2(command):
    check(run(*command, "-s", "nonsense"), 2, "--server: 'nonsense' is not host:port")


@pytest.mark.parametrize("command", ASKING.values(), ids=ASKING)
def test_a_wrong_key_is_1(command, monkeypatch):
    monkeypatch.setenv("HEADRACE_API_KEY", "hr_wrong")
    with FakeRouter(token="hr_right") as router:
        result = run(*command, "-s", router.address)
    check(result, 1, "send a key of the router")
    assert "hr_wrong" not in result.stderr


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_another_model_is_2(command):
    with FakeRouter([NotFoundError("UNKNOWN_MODEL", "no model 'nope' here")]) as router:
        check(run(*ASKING[command], "--model", "nope", "-s", router.address), 2, "nope")


def test_no_model_is_2(tmp_path):
    check(run("up", "--model", tmp_path), 2, "config.json")
    result = run("demo", "--model", tmp_path)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "config.json" in result.stderr


@pytest.fixture
def blocked(tmp_path) -> Path:
    """A path at which no file or folder can be made: what should be its folder is a file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "x"


UNWRITABLE = {
    "bench --json": ["bench", "--num-requests", "1", "--json"],
    "bench --html": ["bench", "--num-requests", "1", "--html"],
    "dashboards": ["dashboards", "--out"],
    "certs": ["certs"],
}


@pytest.mark.parametrize("command", UNWRITABLE.values(), ids=UNWRITABLE)
def test_a_file_that_can_not_be_written_is_2_before_anything_is_done(command, blocked):
    with FakeRouter() as router:
        server = ["-s", router.address] if command[0] == "bench" else []
        check(run(*command, blocked, *server), 2, str(blocked))
        assert router.requests == []


def test_a_file_of_keys_that_can_not_be_written_is_2(blocked):
    check(run("keys", blocked, "alice"), 2, str(blocked))


def test_a_folder_of_certificates_that_can_not_be_made_is_2(blocked, model_dir):
    check(run("up", "--model", model_dir, "--tls", blocked), 2, str(blocked))


def process(module: str, *arguments: object, cwd: Path) -> tuple[int, str]:
    """Run a process to its end; return its code and the last line that it printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *map(str, arguments)],
        capture_output=True, text=True, timeout=2 * WAIT_S, check=False, cwd=cwd,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    problems = [line for line in done.stderr.splitlines() if line.startswith("error:") or " E " in line]
    assert len(problems) == 1, done.stderr
    return done.returncode, problems[0]


def test_a_process_that_can_not_start_ends_with_2(tmp_path, blocked, model_dir):
    taken = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    here = ["--model", model_dir, "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    with taken:
        for module, arguments, says in (
            ("headrace_router", ["--model", tmp_path], "config.json|tokenizer"),
            ("headrace_router", [*here, "--ready-file", blocked], re.escape(str(blocked))),
            ("headrace_router", [*here, "--metrics-listen", address], address),
            ("headrace_router", [*here, "--listen", address], address),
            ("headrace_router", [*here, "--tls", blocked], re.escape(str(blocked))),
            ("headrace_prefill", [*here, "--nonsense", "1"], "there is no option --nonsense"),
            ("headrace_decode", [*here, "--metrics-listen", address], address),
        ):
            code, line = process(module, *arguments, cwd=tmp_path)
            assert code == 2
            assert re.search(says, line), line
