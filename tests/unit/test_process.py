"""A process from start to exit, as its parent sees it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import urllib.request

import pytest
from headrace_core.testing.async_test import WAIT_S

SERVICE = textwrap.dedent("""
    import asyncio, gc, os, resource, sys
    from prometheus_client import CollectorRegistry
    from headrace_core.command_line import parse
    from headrace_core.config import RouterSettings
    from headrace_core.errors import CheckpointError, UnavailableError
    from headrace_core.process import run

    mode = sys.argv.pop(1)
    if mode == "files":
        # Not before it is executed: a process with threads that forks to run Python may die of it.
        resource.setrlimit(resource.RLIMIT_NOFILE, [int(limit) for limit in os.environ["FILES"].split()])

    class Fake:
        def __init__(self):
            self.registry = CollectorRegistry()
            self.addresses = {}
            self.failed = asyncio.get_running_loop().create_future()
        async def start(self):
            if mode.startswith("bad"):
                raise CheckpointError("DAMAGED_FILE", "shard 2 is cut short; download it again")
            if mode == "slow":
                print("loading", file=sys.stderr, flush=True)
                await asyncio.Event().wait()
            if mode == "fail of another":
                self.failed.set_exception(UnavailableError("RANK_LOST", "rank 1 is gone; start the group again"))
            elif mode.startswith("fail"):
                self.failed.set_exception(RuntimeError("engine died"))
            return "127.0.0.1:1"
        async def drain(self):
            if mode == "stuck":
                await asyncio.Event().wait()
        async def stop(self):
            print("freed", flush=True)
            if mode == "frozen":
                print(gc.get_freeze_count() > 10_000, flush=True)
            if "hang" in mode:
                await asyncio.Event().wait()
            if "raise" in mode:
                raise RuntimeError("a socket is gone")
            if mode == "files":
                print(*resource.getrlimit(resource.RLIMIT_NOFILE), flush=True)

    run(Fake, parse(RouterSettings), role="router")
""")


@pytest.fixture
def start(tmp_path):
    children = []

    def start(mode, *options, **environment):
        script = tmp_path / "service.py"
        script.write_text(SERVICE)
        child = subprocess.Popen(
            [sys.executable, str(script), mode, "--model", str(tmp_path), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def wait_for_line(child, text):
    """Read standard error until a line holds `text`; the test's own limit bounds it."""
    for line in child.stderr:
        if text in line:
            return
    raise AssertionError(f"the process ended before it said {text!r}")


def test_sigterm_drains_and_exits_0(start, tmp_path):
    ready_file = tmp_path / "ready.json"
    child = start("ok", "--ready-file", str(ready_file))
    wait_for_line(child, "serving")
    ready = json.loads(ready_file.read_text())
    assert (ready["role"], ready["address"], ready["pid"]) == ("router", "127.0.0.1:1", child.pid)
    assert urllib.request.urlopen(f"http://{ready['metrics_address']}/metrics", timeout=WAIT_S).status == 200
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=WAIT_S)
    assert (child.returncode, out) == (0, "freed\n"), err


def test_a_drain_that_hangs_ends_after_drain_s(start):
    child = start("stuck", "--drain-s", "0.2")
    wait_for_line(child, "serving")
    child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=WAIT_S)[0] == "freed\n"
    assert child.returncode == 0


def test_a_second_signal_exits_at_once(start):
    child = start("stuck", "--drain-s", "600")
    wait_for_line(child, "serving")
    child.send_signal(signal.SIGTERM)
    wait_for_line(child, "draining")
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=WAIT_S)
    assert child.returncode == 130


@pytest.mark.parametrize(
    ("mode", "code", "said"),
    [
        ("hang", 0, "stopping took too long"),
        ("raise", 0, "a socket is gone"),
        ("fail-hang", 1, "engine died"),
        ("bad-raise", 2, "shard 2 is cut short"),
    ],
)
def test_a_stop_that_hangs_or_fails_changes_no_exit_code(start, mode, code, said):
    child = start(mode, "--drain-s", "0")
    if code == 0:
        wait_for_line(child, "serving")
        child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=WAIT_S)
    assert (child.returncode, out) == (code, "freed\n")
    assert said in err
    assert "TimeoutError" not in err


@pytest.mark.parametrize(("hard", "is_few"), [(8192, False), (500, True)])
def test_a_process_opens_as_many_files_as_it_may_and_says_if_those_are_few(start, hard, is_few):
    child = start("files", FILES=f"100 {hard}")
    if is_few:
        wait_for_line(child, "ulimit -n")
    wait_for_line(child, "serving")
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=WAIT_S)
    assert (child.returncode, out) == (0, f"freed\n{hard} {hard}\n"), err
    assert "ulimit" not in err


def test_a_failed_service_exits_1(start):
    child = start("fail")
    _, err = child.communicate(timeout=WAIT_S)
    assert child.returncode == 1
    assert "RuntimeError: engine died" in err


def test_a_service_that_fails_for_another_says_so_in_one_line(start):
    _, err = (child := start("fail of another")).communicate(timeout=WAIT_S)
    assert child.returncode == 1
    assert "E failed reason=RANK_LOST problem=rank 1 is gone; start the group again\n" in err
    assert "UnavailableError" not in err


def test_an_error_at_start_is_one_line_and_exits_2(start):
    child = start("bad")
    out, err = child.communicate(timeout=WAIT_S)
    assert (child.returncode, out) == (2, "freed\n")
    assert "shard 2 is cut short; download it again" in err
    assert "Traceback" not in err


def test_a_signal_while_starting_exits_0(start):
    child = start("slow")
    wait_for_line(child, "loading")
    child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=WAIT_S)[0] == "freed\n"
    assert child.returncode == 0


def test_a_bad_option_is_named_and_exits_2(start):
    child = start("ok", "--drain-s", "-1")
    _, err = child.communicate(timeout=WAIT_S)
    assert child.returncode == 2
    assert err.splitlines() == [
        "error: --drain-s: Input should be greater than or equal to 0",
        "`python -m headrace_router --help` lists the options.",
    ]


_CHURN = """
import resource, sys
from headrace_core.process import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def churn():
    frames = [b"x" * (1 << 20) for _ in range(16)]
    del frames
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in str(os.confstr("CS_GNU_LIBC_VERSION")), reason="glibc")
def test_frames_that_come_and_go_are_not_given_back_to_the_kernel_each_time():
    def num_faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", _CHURN, how], capture_output=True, check=True).stdout)

    assert num_faults("keep") < 16 * 256 < num_faults("leave"), "each frame has 256 of the kernel's pages"


def test_the_collector_does_not_look_again_at_what_a_process_starts_with(start):
    child = start("frozen")
    wait_for_line(child, "serving")
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=WAIT_S)
    assert out == "freed\nTrue\n"


@pytest.mark.parametrize("path", ["/nowhere/ready.json", "/dev/null/ready.json", "/tmp"])
def test_a_ready_file_that_can_not_be_written_is_told_before_anything_is_loaded(start, path):
    child = start("slow", "--ready-file", path)
    out, err = child.communicate(timeout=WAIT_S)
    assert (child.returncode, out) == (2, "")
    assert f"reason=READY_FILE problem=the ready file {path} can't be written" in err
    assert "Traceback" not in err
    assert "loading" not in err


_HUGE = """
from headrace_core.process import use_huge_pages
use_huge_pages()
import torch
weights = torch.ones(64 << 20, dtype=torch.uint8)
middle = weights.data_ptr() + (32 << 20)
is_inside = False
for line in open("/proc/self/smaps"):
    first, *_ = line.split(" ", 1)
    if "-" in first and not first.endswith(":"):
        start, end = (int(each, 16) for each in first.split("-"))
        is_inside = start <= middle < end
    elif is_inside and first == "VmFlags:":
        print("hg" in line.split())
"""


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="this kernel has no huge pages")
def test_a_workers_tensors_ask_for_huge_pages_unless_somebody_says_otherwise():
    def asks(**env) -> str:
        kept = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
        child = subprocess.run(
            [sys.executable, "-c", _HUGE], env=kept | env, capture_output=True, text=True, check=True
        )
        return child.stdout.strip()

    assert (asks(), asks(THP_MEM_ALLOC_ENABLE="0")) == ("True", "False")
