"""What a process is told of its place in a group, and which groups can serve a model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from headrace_client.cluster.rank_places import rank_environments
from headrace_core.errors import StartupError
from headrace_core.ranks.layout import ExpertsBy, ParallelLayout
from headrace_core.ranks.place import ALONE_PLACE, RankPlace, own_place, read_place, take_gpu
from headrace_core.ranks.served import served_layout
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_config

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node",
    "MASTER_PORT": "29500",
}


def test_torchrun_says_which_rank_a_process_is():
    assert read_place(TORCHRUN) == RankPlace(3, 4, 1)
    assert read_place({**TORCHRUN, "LOCAL_RANK": "0"}) == RankPlace(3, 4, 0)


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_who_is_told_nothing_or_of_one_rank_is_alone(environment):
    assert read_place(environment) is ALONE_PLACE


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"RANK": "4"}, "RANK is 4, WORLD_SIZE 4: ranks are 0 to 3"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
    ],
)
def test_half_a_place_is_refused(changed, complaint):
    with pytest.raises(StartupError, match=complaint) as told:
        read_place(TORCHRUN | changed)
    assert told.value.reason == "BAD_RANKS"


def test_a_process_reads_its_own_place(monkeypatch):
    for name, value in {**TORCHRUN, "CUDA_VISIBLE_DEVICES": "2,3"}.items():
        monkeypatch.setenv(name, value)
    assert own_place() == RankPlace(3, 4, 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


TORCHRUN_OF_ONE_RANK = '''
import subprocess, sys, time
rank = """
import signal
from headrace_core.ranks.place import own_place
own_place()
print("there", flush=True)
signal.pause()
"""
child = subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
'''


def test_a_rank_leaves_when_torchrun_is_killed():
    environment = {**os.environ, **TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}
    command = [sys.executable, "-c", TORCHRUN_OF_ONE_RANK]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as torchrun:
        assert torchrun.stdout is not None
        pid = int(torchrun.stdout.readline())
        torchrun.kill()
        torchrun.wait()
        deadline = time.monotonic() + WAIT_S
        while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX":
            assert time.monotonic() < deadline, "it is still there"
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("visible", "size", "left"),
    [
        (None, 4, "1"),  # its own of the machine's
        ("4,5,6,7", 4, "5"),  # its own of those that it was given
        ("GPU-ab", 4, "GPU-ab"),  # it was given its own
        ("2", 1, "2"),
    ],
)
def test_each_rank_of_a_machine_sees_one_gpu(visible, size, left):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    take_gpu(RankPlace(min(1, size - 1), size, min(1, size - 1)), environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == left


def test_a_local_cluster_tells_its_ranks_what_torchrun_would():
    places = [read_place(environment) for environment in rank_environments(3)]
    assert places == [RankPlace(0, 3, 0), RankPlace(1, 3, 1), RankPlace(2, 3, 2)]
    (port,) = {int(environment["MASTER_PORT"]) for environment in rank_environments(3)}
    assert 20_000 <= port < 32_768, "of those that the kernel gives to whoever asks first"
    assert [read_place(environment) for environment in rank_environments(1)] == [ALONE_PLACE]


def test_a_group_shares_attention_and_experts_among_all_its_ranks_or_attention_among_lanes(tmp_path: Path):
    write_config(tmp_path, TINY_CONFIGS["v3"])
    assert served_layout(tmp_path, 4, attention_tp=2, experts="ep").num_lanes == 2
    assert served_layout(tmp_path, 2, attention_tp=0, experts="ep") == ParallelLayout(2, ExpertsBy.EXPERT, 2)
    assert served_layout(tmp_path, 2, attention_tp=2, experts="tp") == ParallelLayout(2, ExpertsBy.COLUMNS, 2)


@pytest.mark.parametrize(
    ("config", "num_ranks", "options", "complaint"),
    [
        ("v3", 3, {}, "4 heads by attention's 3 ranks"),
        ("v3", 2, {"experts": "dp"}, "--experts 'dp': say ep"),
        ("v3", 4, {"attention_tp": 3}, "attention's 3 ranks do not divide the experts' 4"),
        ("v3", 2, {"attention_tp": 4}, "attention is over 4 ranks but experts over 2"),
        ("mixtral", 8, {}, "4 heads by attention's 8 ranks"),
    ],
)
def test_a_group_that_can_not_serve_a_model_is_refused_with_what_to_do(
    tmp_path: Path, config, num_ranks, options, complaint
):
    write_config(tmp_path, TINY_CONFIGS[config])
    with pytest.raises(StartupError, match=complaint) as told:
        served_layout(tmp_path, num_ranks, **{"attention_tp": 0, "experts": "ep"} | options)
    assert told.value.reason == "BAD_RANKS"
