"""headrace doctor: what a worker's process answers, and what the command shows of it."""

import json
import subprocess
from dataclasses import replace

import pytest
from headrace_client.commands import doctor as doctor_module
from headrace_client.commands.app import app
from headrace_client.doctor import outlook as outlook_module
from headrace_client.doctor.outlook import Outlook, outlook
from typer.testing import CliRunner

from tests.unit.test_doctor import BUILD, MACHINE, NO_COMPILER, WORKER, worker


def answering(monkeypatch, program: str) -> Outlook:
    monkeypatch.setattr(outlook_module, "_PROGRAM", ("-c", program))
    return outlook(MACHINE)


def test_a_worker_s_answer_is_the_last_line(monkeypatch):
    found = answering(monkeypatch, "print('noise'); print('{\"kernels_problem\": \"\"}')")
    assert (found.worker, found.can_run) == ({"kernels_problem": ""}, True)


@pytest.mark.parametrize(
    ("program", "problem", "is_refused"),
    [
        ('print(\'{"kernels_problem": "no triton"}\')', "no triton", False),
        ("import headrace_has_no_such_module", "No module named 'headrace_has_no_such_module'", False),
        ("import os; os.abort()", "ended by signal 6", False),
        (
            "import sys; sys.stderr.write('error: --threads: wrong\\n`x --help` lists the options.\\n'); sys.exit(2)",
            "--threads: wrong",
            True,
        ),
    ],
)
def test_a_worker_that_can_t_run_says_why(monkeypatch, program, problem, is_refused):
    found = answering(monkeypatch, program)
    assert not found.can_run
    assert (problem in found.problem, found.is_refused) == (True, is_refused)


def test_a_worker_that_does_not_answer_is_not_waited_for(monkeypatch):
    def hangs(command, *, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(outlook_module.subprocess, "run", hangs)
    assert outlook(MACHINE).problem == "a worker's process did not answer in 300 s"


def test_without_packages_no_process_is_started(monkeypatch):
    monkeypatch.setattr(outlook_module.subprocess, "run", None)
    found = outlook(replace(MACHINE, packages={"torch": "", "psutil": ""}))
    assert (found.worker, found.problem) == (None, "torch and psutil are not installed")
    assert outlook(replace(MACHINE, packages={"torch": "", "psutil": "7"})).problem == "torch is not installed"


def run(monkeypatch, machine, found, *arguments, width="140"):
    monkeypatch.setattr(doctor_module, "look", lambda: machine)
    monkeypatch.setattr(doctor_module, "outlook", lambda _: found)
    env = {"COLUMNS": width, "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["doctor", *arguments], catch_exceptions=False, env=env)


CLIENT_ONLY = replace(MACHINE, packages=dict.fromkeys(MACHINE.packages, ""))


NO_TORCH = Outlook(None, "torch and psutil are not installed")


def test_a_machine_where_a_worker_can_run_exits_with_0(monkeypatch):
    result = run(monkeypatch, MACHINE, Outlook(worker(), ""))
    assert (result.exit_code, result.stderr) == (0, "")
    for part in ("This machine has", "Xeon 8480", "A worker uses", "on avx2 here", "A worker can run here.\n"):
        assert part in result.stdout
    assert "Missing" not in result.stdout
    assert "\x1b" not in result.stdout


def test_a_client_s_install_says_what_to_install_and_exits_with_1(monkeypatch):
    result = run(monkeypatch, CLIENT_ONLY, NO_TORCH)
    assert (result.exit_code, result.stderr) == (1, "")
    for part in (
        "(needed)",
        "\n    pip install 'headrace[worker]'\n",
        "No worker can run here: torch and psutil are not",
    ):
        assert part in result.stdout
    assert "A worker uses" not in result.stdout


def test_60_columns_wrap_all_but_commands(monkeypatch):
    result = run(monkeypatch, replace(MACHINE, docker=""), Outlook(worker(**NO_COMPILER), ""), width="60")
    commands = [line for line in result.stdout.splitlines() if line.startswith("    pip ") or "apt-get" in line]
    assert [line.strip().partition("  #")[0] for line in commands] == [
        f"pip install 'headrace[compiler]' && env -u CXX {BUILD}",
        "sudo apt-get install docker.io docker-compose-v2",
    ]
    assert max(len(line) for line in result.stdout.splitlines() if line not in commands) <= 60


@pytest.mark.parametrize(("machine", "found", "code"), [(MACHINE, Outlook(WORKER, ""), 0), (CLIENT_ONLY, NO_TORCH, 1)])
def test_json_has_all_of_it(monkeypatch, machine, found, code):
    result = run(monkeypatch, machine, found, "--json")
    assert result.exit_code == code
    report = json.loads(result.stdout)
    assert (report["can_run_worker"], report["problem"], report["worker"]) == (not code, found.problem, found.worker)
    assert report["machine"]["packages"] == machine.packages
    assert [each["command"] for each in report["missing"]] == (["pip install 'headrace[worker]'"] if code else [])


def test_settings_of_the_environment_that_no_worker_takes_are_named(monkeypatch):
    monkeypatch.setenv("HEADRACE_DECODE_THREADS", "many")
    found = outlook(MACHINE)
    assert found.is_refused
    assert "--threads" in found.problem
