"""The command for a day with a GPU, tried on a CPU: every part begins, keeps what it found, and leaves no process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from headrace_core.testing.async_test import WAIT_S

ROOT = Path(__file__).parents[2]
FIRST = ["parity", "compile", "step", "kernels", "tokens", "profile"]


def gpu_day(out, *arguments):
    command = [sys.executable, "-m", "tests.perf.gpu_day", *arguments, "--out", str(out)]
    # By this name what it starts is found again.
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "GPU_DAY_TEST": str(out)}, stdout=subprocess.PIPE)


def left_behind(out):
    """What the command started and still runs."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GPU_DAY_TEST") == str(out) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def parts(out):
    return {line["name"]: line["status"] for line in lines(out / "parts.jsonl")}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_no_part_outlives_a_time_too_short_for_any(tmp_path):
    """Which is less than it takes to import torch; on a busy machine it's over once the first parts have ended."""
    day = gpu_day(tmp_path, "first", "--dry-run", "--seconds", "3")
    told = day.communicate(timeout=WAIT_S)[0].decode()
    assert day.returncode == 1
    assert list(parts(tmp_path)) == FIRST
    assert parts(tmp_path)["parity"] == "cut off"
    assert set(parts(tmp_path).values()) <= {"cut off", "not started", "skipped"}
    assert (tmp_path / "summary.txt").read_text() == told
    assert not left_behind(tmp_path)


def test_a_run_passes_and_keeps_what_each_part_found(tmp_path):
    options = ["--parity", "tests/parity/kernels/test_rms_norm.py::test_what_does_not_fit"]
    day = gpu_day(tmp_path, "second", "--dry-run", *options, "--family", "rms_norm", "--seconds", str(4 * WAIT_S))
    told = day.communicate(timeout=5 * WAIT_S)[0].decode()
    assert day.returncode == 0, told
    assert parts(tmp_path) == {"parity": "passed", "kernels": "passed"}
    assert [line["outcome"] for line in lines(tmp_path / "parity.jsonl")] == ["began", "passed"]
    assert [line["family"] for line in lines(tmp_path / "kernels.jsonl")[1:]] == ["rms_norm"] * 2
    assert "parity: 1 passed" in told


def test_what_a_profiler_looks_at_runs():
    command = [sys.executable, "-m", "tests.perf.gpu_day.one_call", "--dry-run", "rms_norm:T=1"]
    assert subprocess.run(command, cwd=ROOT, timeout=WAIT_S, check=False).returncode == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_who_ends_it_has_what_was_found_and_no_process_left(tmp_path, signum):
    day = gpu_day(tmp_path, "first", "--dry-run", "--seconds", str(4 * WAIT_S))
    ends_at = time.monotonic() + WAIT_S
    while not any(line["outcome"] == "passed" for line in lines(tmp_path / "parity.jsonl")):
        assert time.monotonic() < ends_at
        time.sleep(0.01)
    day.send_signal(signum)
    told = day.communicate(timeout=WAIT_S)[0].decode()
    assert day.returncode == 1
    assert not left_behind(tmp_path)
    assert {name: parts(tmp_path)[name] for name in FIRST[2:]} == dict.fromkeys(FIRST[2:], "not started")
    assert "parity: " in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_starts(tmp_path):
    day = gpu_day(tmp_path, "first", "--seconds", str(WAIT_S))
    told = day.communicate(timeout=2 * WAIT_S)[0].decode()
    assert day.returncode == 3
    assert "sees no GPU" in told
    assert "--dry-run needs no GPU" in told
    assert not (tmp_path / "parts.jsonl").exists()
