"""The command with standard streams that are closed, full, or not read; signals at every stage of a start."""

import os
import signal
import subprocess
import sys

import pytest
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.fake_router import FakeRouter, Hold, answer

ENV = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-P", "-m", "headrace_client"]
LONG = ["word " * 1000] * 20
"""More than a pipe holds."""

PRINTING = {
    "help": ["--help"],
    "help of a command": ["generate", "--help"],
    "help of a plugin": ["roofline", "--help"],
    "version": ["--version"],
    "generate": ["generate", "Tell", "--server", "ROUTER"],
    "json": ["generate", "Tell", "--json", "--server", "ROUTER"],
    "status": ["status", "--server", "ROUTER"],
    "top": ["top", "--server", "ROUTER"],
    "roofline": ["roofline"],
    "plan": ["plan", "--workload", "1000,100,1", "--no-simulate"],
    "simulate": ["simulate", "--workload", "1000,100,1", "--requests", "4", "--prefill", "1", "--decode", "1"],
    "keys": ["keys", "keys.toml", "alice"],
    "certs": ["certs", "made"],
    "dashboards": ["dashboards"],
    "doctor": ["doctor"],
}


@pytest.fixture(scope="module")
def router():
    with FakeRouter([*answer(*LONG)]) as fake:
        yield fake


def shell(script: str, arguments: list[str], *, router: FakeRouter, cwd) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which "$@" is the command."""
    filled = [router.address if argument == "ROUTER" else argument for argument in arguments]
    line = ["bash", "-c", f"set -o pipefail; {script}", "bash", *COMMAND, *filled]
    return subprocess.run(line, capture_output=True, text=True, env=ENV, cwd=cwd, timeout=WAIT_S, check=False)


@pytest.mark.parametrize("arguments", PRINTING.values(), ids=PRINTING)
def test_a_full_disk_is_one_line_and_exit_code_1(router, arguments, tmp_path):
    result = shell('"$@" > /dev/full', arguments, router=router, cwd=tmp_path)
    said = "error: can't write to standard output: No space left on device\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", said)


@pytest.mark.parametrize("name", ["help", "generate", "status"])
def test_a_closed_standard_output_is_one_line_and_exit_code_1(router, name, tmp_path):
    result = shell('"$@" >&-', PRINTING[name], router=router, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, "error: can't write to standard output: it is closed\n")


@pytest.mark.parametrize(
    ("arguments", "reader"),
    [
        (["generate", "Tell", "--server", "ROUTER"], "head -c 5"),
        (["status", "--watch", "--server", "ROUTER"], "head -1"),
        (["status", "--watch", "--json", "--interval", "1000000", "--server", "ROUTER"], "head -c 5"),
        (["roofline", "--json"], "true"),
        (["--help"], "true"),
    ],
)
def test_a_reader_that_leaves_ends_the_command_in_silence(router, arguments, reader, tmp_path):
    result = shell(f'"$@" | {reader}', arguments, router=router, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", ">&- 2>&- <&-"])
def test_a_closed_or_full_standard_error_keeps_the_exit_code(router, closed, tmp_path):
    assert shell(f'"$@" {closed}', ["generate", ""], router=router, cwd=tmp_path).returncode == 2
    assert shell(f'"$@" {closed}', ["nonsense"], router=router, cwd=tmp_path).returncode == 2


def test_a_closed_standard_input_is_an_empty_one(router, tmp_path):
    result = shell('"$@" <&-', ["generate", "-", "--server", "ROUTER"], router=router, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (2, "error: the prompt is empty\n")
    result = shell('"$@" <&-', ["chat", "--server", "ROUTER"], router=router, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_a_question_mark(encoding, tmp_path):
    with FakeRouter([*answer("naïve ", "狐")]) as router:
        line = f'PYTHONIOENCODING={encoding} LC_ALL=C "$@"'
        result = subprocess.run(
            ["bash", "-c", line, "bash", *COMMAND, "generate", "Tell", "-s", router.address, "--timings"],
            capture_output=True, env=ENV, cwd=tmp_path, timeout=WAIT_S, check=False,
        )  # fmt: skip
    assert result.returncode == 0
    assert result.stdout.decode(encoding) == ("na?ve ?\n" if encoding == "ascii" else "naïve ?\n")
    assert b"first token" in result.stderr


AT_IMPORT = """
import os, runpy, sys

class Signal:
    def find_spec(self, name, path, target=None):
        if name == POINT:
            os.kill(os.getpid(), NUMBER)

sys.meta_path.insert(0, Signal())
sys.argv = ARGUMENTS
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def at_import(point: str, number: signal.Signals, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module as a program that gets a signal when it begins to import another."""
    code = AT_IMPORT.replace("POINT", repr(point)).replace("NUMBER", str(int(number)))
    code = code.replace("ARGUMENTS", repr(list(arguments)))
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=ENV, timeout=WAIT_S, check=False
    )


@pytest.mark.parametrize("point", ["headrace_client.commands.standard_streams", "grpc", "headrace_client.commands.up"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_while_the_command_imports_ends_it_in_silence(point, number, code):
    result = at_import(point, number, "headrace_client", "--version")
    assert (result.returncode, result.stdout, result.stderr) == (code, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("module", "point"),
    [
        ("headrace_router", "headrace_core.config"),
        ("headrace_router", "headrace_router.service"),
        ("headrace_prefill", "headrace_prefill.service"),
        ("headrace_decode", "headrace_core.config"),
        ("headrace_decode", "torch"),
    ],
)
def test_a_signal_while_a_service_imports_ends_it_with_0(module, point, number, tmp_path):
    result = at_import(point, number, module, "--model", str(tmp_path), "--listen", "127.0.0.1:0")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", [["generate", "Tell"], ["status", "--watch", "--interval", "1000000"]])
def test_a_signal_ends_what_is_under_way(command, number, code):
    with FakeRouter([next(answer("a", "b")), Hold.UNTIL_CANCELLED]) as router:
        line = [*COMMAND, *command, "--server", router.address]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) as child:
            child.stdout.read(1)
            child.send_signal(number)
            _, complaint = child.communicate(timeout=WAIT_S)
    assert (child.returncode, complaint) == (code, "\ninterrupted\n" if number == signal.SIGINT else "")
