"""LocalCluster with trivial children: a script that writes a ready file stands in for every service."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from headrace_client.cluster import local_cluster
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.errors import InvalidRequestError, StartupError, UnavailableError
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_config

CHILD = """
import json, os, signal, sys, time

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("arguments", json.dumps(options), flush=True)
print("threads", os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"], flush=True)
print("rank", os.environ.get("RANK"), "of", os.environ["WORLD_SIZE"], os.environ.get("MASTER_PORT"), flush=True)
if "--fail" in options:
    print("can't start: " + options["--fail"], file=sys.stderr, flush=True)
    raise SystemExit(2)
def drain(*_):
    os.write(1, b"drained\\n")
    os._exit(0)

signal.signal(signal.SIGTERM, signal.SIG_IGN if "--deaf" in options else drain)
address = options["--listen"] if not options["--listen"].endswith(":0") else f"127.0.0.1:{os.getpid()}"
ready = {"role": "x", "address": address, "metrics_address": "127.0.0.1:1", "pid": os.getpid()}
if "--mute" not in options and os.environ.get("RANK", "0") == "0":
    with open(options["--ready-file"] + ".new", "w") as file:
        json.dump(ready, file)
    os.replace(options["--ready-file"] + ".new", options["--ready-file"])
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def programs(tmp_path: Path) -> dict:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return {role: (str(script),) for role in ("router", "prefill", "decode", "both")}


def make(model: Path, programs: dict, **options) -> LocalCluster:
    return LocalCluster(model, programs=programs, wait_for_workers=False, start_timeout_s=WAIT_S, **options)


def is_running(pid: int) -> bool:
    """True unless the process is gone or only waits to be reaped by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition) -> bool:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def stop_clock_until(monkeypatch, condition) -> None:
    """Let time limits of the cluster stand still until `condition` holds, and be over then."""
    clock = SimpleNamespace(monotonic=lambda: 1e9 if condition() else 0.0, sleep=time.sleep)
    monkeypatch.setattr(local_cluster, "time", clock)


def rank_of(process) -> list[str]:
    assert wait_until(lambda: len(process.lines()) >= 3)
    return process.lines()[2].split()[1:]


def arguments_of(process) -> dict:
    assert wait_until(lambda: len(process.lines()) >= 2)
    return json.loads(process.lines()[0].removeprefix("arguments "))


def test_a_worker_of_several_ranks_is_as_many_processes_and_one_worker(model, programs):
    write_config(model, TINY_CONFIGS["v3"])
    with make(model, programs, num_decode=2, decode_ranks=2) as cluster:
        names = ["prefill-0", "decode-0", "decode-0.1", "decode-1", "decode-1.1", "router"]
        assert [process.name for process in cluster.processes] == names
        assert [process.name for process in cluster.workers] == ["prefill-0", "decode-0", "decode-1"]
        first, second = (cluster.ranks(worker) for worker in cluster.workers[1:])
        told = [[rank_of(process) for process in group] for group in ([cluster.workers[0]], first, second)]
        ports = [group[0][3] for group in told]
        assert told == [
            [["None", "of", "1", "None"]],
            [[str(rank), "of", "2", ports[1]] for rank in range(2)],
            [[str(rank), "of", "2", ports[2]] for rank in range(2)],
        ]
        assert ports[1] != ports[2]
        workers = Path(arguments_of(cluster.router)["--workers-file"]).read_text().split()
        assert workers == [process.address for process in cluster.workers]
        for process in first:
            process.kill()
            process.wait()
        successor = cluster.restart(first[0])
        assert [process.rank for process in cluster.ranks(successor)] == [0, 1]
        assert arguments_of(successor)["--listen"] == first[0].address
        pids = [process.pid for process in cluster.processes]
    assert not any(is_running(pid) for pid in pids)


def test_ranks_that_can_not_share_the_model_are_refused_before_one_starts(model, programs):
    write_config(model, TINY_CONFIGS["v3"])
    cluster = make(model, programs, decode_ranks=3)
    with pytest.raises(StartupError, match="4 heads by attention's 3 ranks"):
        cluster.start()
    assert not cluster.processes


def test_a_rank_that_can_not_start_ends_the_start(model, programs):
    write_config(model, TINY_CONFIGS["v3"])
    script = model / "child.py"
    script.write_text(script.read_text().replace('if "--fail" in options:', 'if os.environ.get("RANK") == "1":'))
    script.write_text(script.read_text().replace('options["--fail"]', '"no memory"'))
    cluster = make(
        model, programs, decode_ranks=2, decode_options={"mute": 1}
    )  # rank 0 serves when all ranks are there
    with pytest.raises(UnavailableError, match=r"decode-0\.1 could not start; it exited with code 2(.|\n)*no memory"):
        cluster.start()


def test_every_process_starts_with_its_options_and_the_router_learns_the_workers(model, programs):
    cluster = make(
        model,
        programs,
        num_prefill=1,
        num_decode=1,
        num_both=1,
        router_options={"max-attempts": 3},
        worker_options={"kv-pool-mib": 8, "threads": 1},
        decode_options={"kv-pool-mib": 16},
    )
    with cluster:
        assert [process.name for process in cluster.processes] == ["prefill-0", "decode-0", "both-0", "router"]
        prefill, decode, both, router = (arguments_of(process) for process in cluster.processes)
        assert (prefill["--kv-pool-mib"], decode["--kv-pool-mib"]) == ("8", "16")
        assert ("--role" in prefill, decode["--role"], both["--role"]) == (False, "decode", "both")
        assert (router["--max-attempts"], "--threads" in router) == ("3", False)
        assert prefill["--threads"] == "1"
        workers = Path(router["--workers-file"]).read_text().split()
        assert workers == [process.address for process in cluster.workers]
        assert cluster.router_address == f"127.0.0.1:{cluster.router.pid}"
        assert cluster.processes[0].lines()[1].startswith("threads ")
        assert cluster.processes[0].lines()[1].endswith(" PASSIVE")
    assert [process.poll() for process in cluster.processes] == [0, 0, 0, 0]
    assert all(process.lines()[-1] == "drained" for process in cluster.processes)
    assert not Path(router["--workers-file"]).parent.exists()


def test_the_log_sink_gets_each_line_with_the_name_of_its_process(model, programs):
    seen: list[tuple[str, str]] = []
    with make(model, programs, log_sink=lambda name, line: seen.append((name, line))):
        pass
    assert {name for name, line in seen if line == "drained"} == {"prefill-0", "decode-0", "router"}


def test_a_worker_added_later_reaches_the_routers_file(model, programs):
    with make(model, programs) as cluster:
        added = cluster.add_decode()
        file = Path(arguments_of(cluster.router)["--workers-file"])
        assert added.name == "decode-1"
        assert file.read_text().split()[-1] == added.address


def test_a_restarted_worker_keeps_its_address(model, programs):
    with make(model, programs) as cluster:
        worker = cluster.workers[1]
        worker.kill()
        assert worker.wait(WAIT_S)
        assert worker.poll() == -signal.SIGKILL
        successor = cluster.restart(worker)
        assert (successor.address, successor.role) == (worker.address, "decode")
        assert successor.pid != worker.pid


def test_a_child_that_cannot_start_is_named_with_its_last_lines_and_nothing_is_left(model, programs):
    cluster = make(model, programs, decode_options={"fail": "out of cheese"})
    with pytest.raises(UnavailableError, match=r"(?s)decode-0 could not start; .*code 2.*out of cheese") as caught:
        cluster.start()
    assert caught.value.reason == "START_FAILED"
    assert all(process.poll() is not None for process in cluster.processes)


def test_a_child_that_never_serves_ends_in_a_timeout(model, programs, monkeypatch):
    cluster = make(model, programs, decode_options={"mute": "1"})
    num_ready: list[str] = []
    cluster.on_ready = lambda process: num_ready.append(process.name)
    stop_clock_until(monkeypatch, lambda: len(num_ready) == 2)  # the two that do serve, however long they take
    with pytest.raises(UnavailableError, match="decode-0 was not ready"):
        cluster.start()
    assert all(process.poll() is not None for process in cluster.processes)


def test_a_child_deaf_to_sigterm_is_killed_after_the_grace(model, programs, monkeypatch):
    cluster = make(model, programs, decode_options={"deaf": "1"})
    cluster.start()
    others = [process for process in cluster.processes if process.role != "decode"]
    stop_clock_until(monkeypatch, lambda: all(process.poll() is not None for process in others))
    cluster.stop(grace_s=WAIT_S)
    assert [process.poll() for process in cluster.processes] == [0, -signal.SIGKILL, 0]


def test_a_stopped_child_still_ends_in_order(model, programs):
    with make(model, programs) as cluster:
        cluster.workers[0].send_signal(signal.SIGSTOP)
    assert cluster.workers[0].poll() == 0


@pytest.mark.parametrize("counts", [(1, 0, 0), (0, 1, 0), (0, 0, 0), (-1, 1, 1)])
def test_a_cluster_that_could_serve_nothing_is_refused(model, programs, counts):
    prefill, decode, both = counts
    with pytest.raises(InvalidRequestError, match="at least one prefill and one decode"):
        make(model, programs, num_prefill=prefill, num_decode=decode, num_both=both).start()


def test_a_folder_that_is_no_model_is_refused(tmp_path, programs):
    with pytest.raises(InvalidRequestError, match=r"config\.json"):
        make(tmp_path / "none", programs).start()


PARENT = """
import sys
from pathlib import Path
from headrace_client.cluster.local_cluster import LocalCluster

script = sys.argv[1]
cluster = LocalCluster(
    Path(sys.argv[2]), programs={r: (script,) for r in ("router", "prefill", "decode")}, wait_for_workers=False
)
cluster.start()
print(*[process.pid for process in cluster.processes], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "one child stopped"])
def test_children_die_with_a_killed_parent(model, programs, stopped):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, programs["router"][0], str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        assert all(is_running(pid) for pid in pids)
        if stopped:
            os.kill(pids[0], signal.SIGSTOP)
        parent.kill()
    assert wait_until(lambda: not any(is_running(pid) for pid in pids))
