"""`headrace up` and `headrace demo` with stand-ins for the services: scripts that write a ready file, and a router
that plays a script over real gRPC."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from headrace_client.cluster import local_cluster
from headrace_client.commands.app import app
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.local_hub import LocalHub, commit_of
from typer.testing import CliRunner

CHILD = """
import json, os, signal, sys, time

from headrace_core.testing.fake_router import FakeRouter, default_info

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))

def drain(*_):
    os.write(1, b"drained\\n")
    os._exit(0)

signal.signal(signal.SIGTERM, drain)
if options.get("--max-step-tokens") == "13":
    print("can't start: problem=13 is unlucky", file=sys.stderr, flush=True)
    raise SystemExit(2)
if options.get("--max-step-tokens") == "14":
    print("01:02:03.004 E can't start reason=BAD problem=14 is unlucky, too", file=sys.stderr, flush=True)
    raise SystemExit(2)
print("metrics on " + options["--metrics-listen"], flush=True)
print("01:02:03.004 I kernels checked", flush=True)
print("01:02:03.004 W few files", flush=True)
address = f"127.0.0.1:{os.getpid()}"
class Router(FakeRouter):
    def GetServerInfo(self, request, context):
        info = default_info()
        del info.workers[:]
        for worker in open(options["--workers-file"]).read().split():
            info.workers.add(address=worker, state="ready")
        return info

if "--workers-file" in options:
    router = Router()
    router.__enter__()
    address = router.address
print("loading", flush=True)
if "--model-name" in options:
    print("called " + options["--model-name"] + " in " + options["--model"], flush=True)
if "--kv-cache-dtype" in options:
    print("cache in " + options["--kv-cache-dtype"], flush=True)
with open(options["--ready-file"] + ".new", "w") as file:
    http = {"http_address": options["--http-listen"]} if "--http-listen" in options else {}
    json.dump({"address": address, "metrics_address": "127.0.0.1:9", **http}, file)
os.replace(options["--ready-file"] + ".new", options["--ready-file"])
while True:
    time.sleep(0.05)
"""
UP = """
import sys
from headrace_client.cluster import local_cluster
local_cluster.PROGRAMS = {role: (sys.argv[1],) for role in local_cluster.PROGRAMS}
sys.argv = ["headrace", *sys.argv[2:]]
from headrace_client.__main__ import main
main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "child.py").write_text(CHILD)
    return tmp_path


def start_up(folder: Path, *arguments: str, model: str = "", env: dict[str, str] | None = None) -> subprocess.Popen:
    command = [sys.executable, "-c", UP, str(folder / "child.py"), "up", "--model", model or str(folder), *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
    )


def read_until(child: subprocess.Popen, text: str) -> list[str]:
    """Read lines up to one that contains `text`; the test's own timeout bounds it."""
    lines = []
    for line in child.stdout:
        lines.append(line.rstrip())
        if text in line:
            return lines
    pytest.fail(f"{text!r} never came; standard error: {child.stderr.read()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_starts_explains_and_ends_everything_on_a_signal(folder, number):
    with start_up(folder, "--decode", "2") as up:
        lines = read_until(up, "Ctrl-C stops everything")
        up.send_signal(number)
        rest, complaint = up.communicate(timeout=WAIT_S)
    assert (up.returncode, complaint) == (0, "")
    for name in ("prefill-0", "decode-0", "decode-1", "router"):
        assert any(f"{name} is ready at 127.0.0.1:" in line for line in lines)
        # What a child prints is shown when it was read, which may be later than what `up` says itself.
        assert any(line.split() == [name, "|", "loading"] for line in [*lines, *rest.splitlines()])
        assert f"{name} | drained" in rest
    assert any("headrace generate --server 127.0.0.1:" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "curl -N http://127.0.0.1:80"),  # the first port that is free from 8000 on
        (("--http-listen", "127.0.0.1:8123"), "curl -N http://127.0.0.1:8123/v1/completions "),
        (("--http-listen", ""), ""),
    ],
)
def test_up_shows_how_to_ask_over_http(folder, arguments, line):
    with start_up(folder, *arguments) as up:
        lines = read_until(up, "Ctrl-C stops everything")
        up.terminate()
        up.communicate(timeout=WAIT_S)
    assert [each.strip()[: len(line)] for each in lines if "curl" in each] == [line] * bool(line)


def test_up_reports_a_worker_that_dies_and_goes_on(folder):
    with start_up(folder) as up:
        lines = read_until(up, "Ctrl-C stops everything")
        ready = next(line for line in lines if line.startswith("decode-0 is ready"))
        os.kill(int(ready.rpartition("pid ")[2].rstrip(")")), signal.SIGKILL)
        read_until(up, "decode-0 ended unasked: SIGKILL")
        assert up.poll() is None
        up.terminate()
        up.communicate(timeout=WAIT_S)
    assert up.returncode == 0


def test_up_ends_when_the_router_dies(folder):
    with start_up(folder) as up:
        lines = read_until(up, "Ctrl-C stops everything")
        ready = next(line for line in lines if line.startswith("router is ready"))
        os.kill(int(ready.rpartition("pid ")[2].rstrip(")")), signal.SIGKILL)
        rest, _ = up.communicate(timeout=WAIT_S)
    assert up.returncode == 1
    assert "router ended unasked: SIGKILL" in rest
    assert "prefill-0 | drained" in rest


def test_up_that_cannot_start_shows_why_and_exits_with_1(folder):
    with start_up(folder, "--decode-option", "max_step_tokens=13") as up:
        _, complaint = up.communicate(timeout=WAIT_S)
    assert up.returncode == 1
    assert "error: decode-0 could not start; it exited with code 2" in complaint
    assert complaint.count("13 is unlucky") == 1


def test_up_says_a_process_s_own_reason_in_one_line(folder):
    with start_up(folder, "--decode-option", "max_step_tokens=14") as up:
        shown, complaint = up.communicate(timeout=WAIT_S)
    assert (up.returncode, complaint) == (1, "error: decode-0 can't start: 14 is unlucky, too\n")
    assert "unlucky" not in shown


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--device", "tpu"), "prefill worker: --device: Input should be 'cpu' or 'cuda'"),
        (("--dtype", "float12"), "prefill worker: --dtype: Input should be 'auto', 'float32' or 'bfloat16'"),
        (("--kernels", "best"), "prefill worker: --kernels: Input should be 'auto', 'reference', 'cpu', 'triton'"),
        (
            ("--decode-option", "page-sise=8"),
            "decode worker: there is no option --page-sise; did you mean --page-size?",
        ),
        (("--router-option", "max-attempts=0"), "router: --max-attempts: Input should be greater than or equal to 1"),
        (("--prefill", "0"), "0 prefill, 1 decode and 0 colocated workers can't serve"),
    ],
)
def test_up_refuses_options_before_it_starts_anything(folder, arguments, line):
    with start_up(folder, *arguments) as up:
        shown, complaint = up.communicate(timeout=WAIT_S)
    assert (up.returncode, shown) == (2, "")
    assert complaint.startswith(f"error: {line}")
    assert complaint.count("\n") == 1


def test_up_refuses_addresses_that_are_taken(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, problem in (
            (
                ("--listen", f"127.0.0.1:{port}"),
                f"--listen 127.0.0.1:{port} is taken, perhaps by another `headrace up`",
            ),
            (("--http-listen", f"127.0.0.1:{port}"), f"--http-listen 127.0.0.1:{port} is taken"),
            (("--metrics-port", str(port)), f"{port} is taken; name another, or 0 for any"),
        ):
            with start_up(folder, *arguments) as up:
                shown, complaint = up.communicate(timeout=WAIT_S)
            assert (up.returncode, shown) == (2, "")
            assert problem in complaint


def test_up_gives_each_process_a_metrics_port_of_its_own_in_a_row(folder):
    with start_up(folder) as up:
        lines = read_until(up, "Ctrl-C stops everything")
        up.terminate()
        rest, _ = up.communicate(timeout=WAIT_S)
    ports = {}
    for line in [*lines, *rest.splitlines()]:
        if "| metrics on 127.0.0.1:" in line:
            ports[line.split()[0]] = int(line.rpartition(":")[2])
    first = ports["router"]
    assert first >= 9100
    assert ports == {"router": first, "prefill-0": first + 1, "decode-0": first + 2}


@pytest.mark.parametrize(("arguments", "is_shown"), [((), False), (("--verbose",), True)])
def test_up_shows_what_processes_log_if_it_matters_or_is_asked_for(folder, arguments, is_shown):
    with start_up(folder, *arguments) as up:
        lines = read_until(up, "Ctrl-C stops everything")
        up.terminate()
        rest, _ = up.communicate(timeout=WAIT_S)
    whole = [*lines, *rest.splitlines()]
    assert any("| 01:02:03.004 W few files" in line for line in whole)
    assert any("| 01:02:03.004 I kernels" in line for line in whole) is is_shown


def test_up_with_keys_says_how_to_show_one_and_shows_none(folder):
    keys = folder / "keys"
    keys.write_text("")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ("--router-option", f"keys-file={keys}", "--http-listen", f"0.0.0.0:{port}")
    with start_up(folder, *options, env={"HEADRACE_API_KEY": "hr-secret"}) as up:
        lines = read_until(up, "Ctrl-C stops everything")
        up.terminate()
        rest, _ = up.communicate(timeout=WAIT_S)
    whole = "\n".join([*lines, rest])
    assert "read -rs HEADRACE_API_KEY && export HEADRACE_API_KEY" in whole
    assert f'echo "authorization: Bearer $HEADRACE_API_KEY" | curl -N http://127.0.0.1:{port}/v1/completions' in whole
    assert "hr-secret" not in whole


@pytest.mark.parametrize(("arguments", "cached"), [((), "auto"), (("--kv-cache-dtype", "fp8_e4m3"), "fp8_e4m3")])
def test_up_gives_every_worker_the_same_cache(folder, arguments, cached):
    with start_up(folder, *arguments) as up:
        lines = read_until(up, "Ctrl-C stops everything")
        up.terminate()
        rest, _ = up.communicate(timeout=WAIT_S)
    told = sorted(line.split()[0] for line in [*lines, *rest.splitlines()] if line.endswith(f"| cache in {cached}"))
    assert told == ["decode-0", "prefill-0"]


@pytest.mark.parametrize(("arguments", "name"), [((), "someone/Tiny"), (("--model-name", "tiny"), "tiny")])
def test_up_downloads_a_model_by_its_name_and_calls_it_so(folder, tmp_path, model_dir, arguments, name):
    home = tmp_path / "home"
    with (
        LocalHub({"someone/Tiny": model_dir}) as hub,
        start_up(folder, *arguments, model="someone/Tiny", env=hub.environment(home)) as up,
    ):
        lines = read_until(up, "Ctrl-C stops everything")
        up.terminate()
        rest, _ = up.communicate(timeout=WAIT_S)
    found = home / "hub" / "models--someone--Tiny" / "snapshots" / commit_of("someone/Tiny")
    told = sorted(
        line.split()[0] for line in [*lines, *rest.splitlines()] if line.endswith(f"| called {name} in {found}")
    )
    assert told == ["decode-0", "prefill-0", "router"]


def test_up_says_the_name_by_which_clients_know_a_linked_folder(folder, tmp_path_factory):
    link = tmp_path_factory.mktemp("models") / "latest"
    link.symlink_to(folder)
    with start_up(folder, model=f"{link}/") as up:
        lines = read_until(up, "Ctrl-C stops everything")
        up.terminate()
        up.communicate(timeout=WAIT_S)
    assert any(line.startswith("latest is served at 127.0.0.1:") for line in lines), lines


def test_up_with_only_colocated_workers_starts_no_others(folder):
    with start_up(folder, "--both", "1") as up:
        lines = read_until(up, "Ctrl-C stops everything")
        up.terminate()
        up.communicate(timeout=WAIT_S)
    assert sorted(line.split()[0] for line in lines if " is ready at " in line) == ["both-0", "router"]


def test_demo_streams_a_story_and_explains_its_time(folder, monkeypatch):
    programs = {role: (str(folder / "child.py"),) for role in local_cluster.PROGRAMS}
    monkeypatch.setattr(local_cluster, "PROGRAMS", programs)
    result = CliRunner().invoke(app, ["demo", "--model", str(folder)], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stderr
    for part in (
        "Zorvim.A story.",
        "first token: 10.00 ms",
        "2 pages, 640.0 KiB, by grpc",
        "is stopped again",
        "Next:",
    ):
        assert part in result.stdout
