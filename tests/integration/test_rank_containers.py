"""What containers of several ranks run: torchrun, as the chart and deploy/compose.ranks.yaml have it."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from headrace_core.probe import probe
from headrace_core.testing.async_test import WAIT_S

from tests.integration.test_helm_processes import answers, free_ports, start
from tests.unit.helm_parts import ROOT, needs_helm


@needs_helm
def test_the_chart_s_groups_answer_and_leave(model_dir, tmp_path):
    """Prefill is a pod of two ranks; decode two pods of one each, and the second is told to leave as the first is."""
    with start("ranks", tmp_path, {"/models/demo": str(model_dir)}) as pods:
        (answer,) = answers(pods)
        assert len(answer.token_ids) == 24
        for role in ("prefill", "decode"):
            with urllib.request.urlopen(f"http://{pods[role].metrics_address}/metrics", timeout=WAIT_S) as page:
                assert re.search(r"^headrace_ranks\{.*\} 2\.0$", page.read().decode(), re.M)
        for pods_of_role in (("decode", "decode 1"), ("prefill",)):
            for name in pods_of_role:
                pods[name].process.send_signal(signal.SIGTERM)
            for name in pods_of_role:
                pods[name].process.wait(4 * WAIT_S)
        logs = {role: (tmp_path / f"{role}.log").read_text() for role in ("prefill", "decode")}
    for role, log in logs.items():
        for rank in (0, 1):
            assert re.search(rf'"event": "draining", "rank": {rank}.*"event": "stopped", "rank": {rank}', log, re.S), (
                log
            )
        assert "RANK_LOST" not in log, f"{role}: nobody was left waiting"


def ranks_of(torchrun: int) -> list[int]:
    """Return the processes that torchrun started and that are ranks."""
    found = []
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if "RANK=" in Path(f"/proc/{child}/environ").read_text():
            found.append(int(child))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_container_ends_when_one_of_its_ranks_dies(model_dir, tmp_path):
    service = yaml.safe_load((ROOT / "deploy" / "compose.ranks.yaml").read_text())["services"]["decode"]
    grpc_port, ranks_port = (port[1:] for port in free_ports(2))
    tini, dashes, python, *program = [
        re.sub(r"\$\{\w+:-(\w+)\}", r"\1", each).replace("29500", ranks_port) for each in service["entrypoint"]
    ]
    assert (tini, dashes, python) == ("tini", "--", "python")
    environment = {
        **os.environ,
        **{name: re.sub(r"\$\{\w+:-(\w+)\}", r"\1", value) for name, value in service["environment"].items()},
        "HEADRACE_DECODE_MODEL": str(model_dir),
        "HEADRACE_DECODE_LISTEN": f"127.0.0.1:{grpc_port}",
        "HEADRACE_DECODE_KV_POOL_MIB": "8",
        "HEADRACE_DECODE_THREADS": "1",
    }
    with (tmp_path / "log").open("w") as log:
        torchrun = subprocess.Popen(
            [sys.executable, *program], env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 6 * WAIT_S
        while probe(f"127.0.0.1:{grpc_port}"):
            assert torchrun.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, "it does not serve"
            time.sleep(0.2)
        _, follower = ranks_of(torchrun.pid)
        os.kill(follower, signal.SIGKILL)
        assert torchrun.wait(4 * WAIT_S) != 0, "Docker starts it again"
    finally:
        torchrun.kill()
        torchrun.wait()
