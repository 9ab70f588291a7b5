"""Where a group's ranks meet: nowhere that another machine could reach, if they are all on this one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from headrace_client.cluster.rank_places import rank_environments
from headrace_core.config import DecodeSettings
from headrace_core.errors import StartupError
from headrace_core.ranks.meeting import meeting_store
from headrace_core.ranks.place import RankPlace, read_place
from headrace_core.testing.async_test import WAIT_S
from headrace_core.worker.rank_group import join

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}

RANK = '''
import json, os
from pathlib import Path
from headrace_core.ranks.group import join_ranks
from headrace_core.ranks.layout import ParallelLayout

def listening():
    """Return the hex addresses at which this process listens."""
    mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
    lines = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{kind}").read_text().splitlines()[1:]]
    return [line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in mine]

ranks = join_ranks(ParallelLayout.parse("tp2", "ep2"), timeout_s=60)
ranks.world.gather_bytes(b"both are there")
said = listening()
ranks.world.gather_bytes(b"both have looked")
print(json.dumps(said))
'''  # noqa: E501 - a program


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_of_one_machine_listen_on_loopback_alone():
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], env={**os.environ, **place}, stdout=subprocess.PIPE, stderr=None, text=True
        )
        for place in rank_environments(2)
    ]
    said = [json.loads(process.communicate(timeout=4 * WAIT_S)[0]) for process in processes]
    assert {address for of_rank in said for address in of_rank} == {"0100007F"}, "127.0.0.1, and not 0.0.0.0 or ::"
    assert all(said), "a rank listens for the others"


def test_a_port_that_another_has_is_one_clear_error(monkeypatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(StartupError, match=f"rank 0 can't be met at 127.0.0.1:{port}: Address") as told:
            meeting_store(0, 2, timedelta(seconds=1))
    assert told.value.reason == "BAD_RANKS"


@pytest.mark.parametrize(
    ("host", "port", "complaint"),
    [
        ("192.0.2.1", "29500", "MASTER_ADDR must be an address of its machine"),  # of a network for documentation
        ("no such name", "29500", "MASTER_ADDR no such name: "),
        ("127.0.0.1", "70000", "MASTER_PORT '70000': say where rank 0 is met"),
        ("127.0.0.1", "x", "MASTER_PORT 'x'"),
    ],
)
def test_rank_0_says_where_it_can_not_be_met(monkeypatch, host, port, complaint):
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(StartupError, match=complaint) as told:
        meeting_store(0, 2, timedelta(seconds=1))
    assert told.value.reason == "BAD_RANKS"


@pytest.mark.parametrize(
    ("changed", "is_one_machine"),
    [
        ({}, False),
        ({"LOCAL_WORLD_SIZE": "2"}, False),
        ({"LOCAL_WORLD_SIZE": "4"}, True),
        ({"MASTER_ADDR": "127.0.0.1"}, True),
        ({"MASTER_ADDR": "::1"}, True),
        ({"MASTER_ADDR": "localhost"}, True),
    ],
)
def test_a_rank_knows_whether_all_are_on_its_machine(changed, is_one_machine):
    assert read_place(TORCHRUN | changed).is_one_machine is is_one_machine


def test_ranks_of_several_machines_are_refused_where_encryption_is_asked_for(tmp_path: Path):
    def settings(**changed: object) -> DecodeSettings:
        return DecodeSettings.model_validate({"model": tmp_path, "tls": tmp_path, **changed})

    apart = RankPlace(0, 4, 0, is_one_machine=False)
    with pytest.raises(StartupError, match="--ranks-in-clear") as told:
        join(settings(), apart)
    assert told.value.reason == "BAD_TLS"
    # The next thing that is asked is the model, of which there is none here.
    for allowed, place in ((settings(ranks_in_clear=True), apart), (settings(), RankPlace(0, 4, 0))):
        with pytest.raises(Exception, match=r"config\.json"):
            join(allowed, place)
