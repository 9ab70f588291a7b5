"""Several router processes behind the same ports: both faces, the way down, and one that dies."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from headrace_client import Client, SamplingParams
from headrace_client.bench.http_target import HttpOptions, HttpTarget
from headrace_core.testing.async_test import WAIT_S
from headrace_router.testing import write_tokenizer

from tests.perf.router.sides import _fake_worker


@pytest.fixture
def fleet(tmp_path):
    """Start two routers over a fake worker; yield (parent, its ready file's content)."""
    ready = tmp_path / "ready.json"
    with _fake_worker("both", 1.0, 64) as worker:
        words = [sys.executable, "-m", "headrace_router", "--model", str(write_tokenizer(tmp_path / "tiny"))]
        words += ["--workers", worker, "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"]
        parent = subprocess.Popen([*words, "--processes", "2", "--ready-file", str(ready)], stderr=subprocess.DEVNULL)
        try:
            until_s = time.monotonic() + WAIT_S
            while not ready.exists():
                assert parent.poll() is None, "the routers ended"
                assert time.monotonic() < until_s, "the routers did not start in time"
                time.sleep(0.02)
            yield parent, json.loads(ready.read_text())
        finally:
            parent.kill()
            parent.wait()


async def _ask_over_many_connections(address, count):
    for _ in range(count):
        target = HttpTarget(f"http://{address}", HttpOptions("tiny"))  # each with a connection of its own
        tokens = []
        await target.ask("a prompt", 4, tokens.append)
        assert sum(tokens) == 4
        await target.close()


def served(metrics_address):
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("headrace_requests_total"))


def test_connections_are_shared_and_the_parent_ends_when_all_have(fleet):
    parent, ready = fleet
    assert len(ready["metrics_addresses"]) == len(set(ready["pids"])) == 2
    asyncio.run(_ask_over_many_connections(ready["http_address"], 40))
    with Client(ready["address"]) as client:
        assert len(client.generate("a", SamplingParams(max_tokens=3, ignore_eos=True)).token_ids) == 3
    counts = [served(address) for address in ready["metrics_addresses"]]
    assert sum(counts) == 41
    assert min(counts) > 0, "by chance once in a million million"
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(WAIT_S) == 0


def test_if_one_dies_all_end_and_somebody_is_told(fleet):
    parent, ready = fleet
    one, other = ready["pids"]
    os.kill(one, signal.SIGKILL)
    assert parent.wait(WAIT_S) == 1
    assert not os.path.exists(f"/proc/{other}/exe")


def test_a_port_that_is_another_s_is_refused(fleet, tmp_path):
    _, ready = fleet
    words = [sys.executable, "-m", "headrace_router", "--model", str(tmp_path / "tiny"), "--workers", "127.0.0.1:1"]
    run = subprocess.run(
        [*words, "--listen", ready["address"], "--processes", "2"], capture_output=True, text=True, timeout=WAIT_S
    )
    assert run.returncode == 1
    assert "can't listen" in run.stderr
