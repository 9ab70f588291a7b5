"""`headrace top` on real processes: what it reads of them, in a pipe, and across a router's restart."""

import subprocess
import sys
import time

import pytest
from headrace_client import Client
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_client.top.history import History, take_look
from headrace_core.errors import UnavailableError
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S

PROMPT = "Once upon a time there was a little fox named Zorvim. " * 4
OPTIONS = {"page-size": 16, "kv-pool-mib": 8}


def generate(client, count=3):
    for _ in range(count):
        client.generate(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))


def test_it_shows_every_process_in_a_pipe_and_goes_on_with_a_router_that_was_restarted(model_dir):
    with LocalCluster(model_dir, worker_options=OPTIONS) as cluster, Client(cluster.router_address) as client:
        generate(client)
        command = [sys.executable, "-m", "headrace_client", "top", "--server", cluster.router_address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        cells = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
        assert cells["TTFT"][-1] == "3"
        assert cells["ITL"][-1] == "21"
        for process in cluster.workers:
            assert cells[process.address][1:3] == [process.role, "ready"]
        assert cells["shm"][5].endswith("B/s"), "how fast pages moved"
        assert "layer" in cells

        seen = History()
        seen.add(take_look(client, time.monotonic()))
        generate(client, 2)
        view = seen.add(take_look(client, time.monotonic()))
        assert set(view.news) == {"", *(process.address for process in cluster.workers)}
        assert view.news[""].samples.total("headrace_requests_total", outcome="ok") == 2

        router = cluster.router
        router.kill()
        router.wait()
        with pytest.raises(UnavailableError):
            take_look(client, time.monotonic())
        cluster.restart(router)
        generate(client, 1)
        view = seen.add(take_look(client, time.monotonic()))
        assert view.news[""].samples.total("headrace_requests_total", outcome="ok") == 1
        assert all(view.news[process.address].span_s > 0 for process in cluster.workers)
