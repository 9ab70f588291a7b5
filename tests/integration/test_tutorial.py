"""The commands of docs/tutorial.md, typed from its first to its last as they stand there, each once.

`headrace up` starts a cluster, on ports that are free, which lasts to the next one; commands that ask a router ask that
of the cluster which runs. Only what the page says to ask again is asked again: whether ranks wait less.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from headrace_core.expert_moves import LEAST_GAIN

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^```sh\n(.*?)\n```$", (ROOT / "docs/tutorial.md").read_text(), re.DOTALL | re.MULTILINE)
EXPERTS = "headrace experts"
ENV = {
    **os.environ,
    "COLUMNS": "120",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
SAYS = (
    ("headrace doctor", ("CPU", "torch")),
    ("headrace up", ("decode-1 is ready at", "Ctrl-C stops everything")),
    ("headrace generate", ("Zorvim", "Time to the first token", "Handed off")),
    ("headrace generate", ("decode-0 ended unasked: SIGKILL",)),
    ("headrace status", ("prefill", "unreachable")),
    ("for dataset", 4 * ("Serving Benchmark Result",)),
    ("headrace up", ("decode-0 is ready at", "Ctrl-C stops everything")),
    ("headrace generate", ("Zorvim", "layer", "4 ranks", "ranks wait")),
    ("headrace bench", ("Successful requests: 16", "Failed requests: 0")),
    (EXPERTS, ("rebalances: ", " 0 failed", "4 ranks, where experts are")),
    ("headrace roofline", ("DECODE", "FLOP")),
    ("headrace plan", ("prefill", "decode", "GPUs")),
)
"""How each command of the page begins, and what is seen of it."""


def typed(command: str, **env: str) -> str:
    """Return what `command` prints; it must succeed."""
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env={**ENV, **env}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def waits(out: str) -> list[int]:
    """Return the losses that `headrace experts` names, per cent: where experts are, and where it would have them."""
    return [int(loss) for loss in re.findall(r"ranks wait (\d+)% of the experts' time", out)]


def asked_until_moved(**env: str) -> str:
    """Type `headrace experts` until experts have moved; the test's timeout bounds it.

    By how much less ranks wait then is not looked at: of tokens that came meanwhile, others may be chosen.
    """
    while True:
        out = typed(EXPERTS, **env)
        if "rebalances: " in out:
            return out


class Cluster:
    """A `headrace up` of the page: what it printed, where its router is, and the pids of its processes by name."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[str] = []
        self.pids: dict[str, str] = {}
        self.address = ""
        self._process = process
        self.read_until("Ctrl-C stops everything")

    def read_until(self, text: str) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if found := re.match(r"(\S+) is ready at .*pid (\d+)", line):
                self.pids[found[1]] = found[2]
            if found := re.search(r"headrace generate --server (\S+:\d+)", line):
                self.address = found[1]
            if text in line:
                return
        pytest.fail(f"{text!r} never came: {self.lines}")


@contextmanager
def started(command: str) -> Iterator[Cluster]:
    """Type a `headrace up`, on free ports; Ctrl-C ends it, and it ends well."""
    free = "--listen 127.0.0.1:0 --http-listen 127.0.0.1:0 --metrics-port 0"
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command} {free}"],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield Cluster(process)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 0


@pytest.fixture(scope="module")
def seen() -> list[str]:
    """What is seen of each command of the page."""
    seen: list[str] = []
    cluster: Cluster | None = None
    with ExitStack() as running:
        for command in COMMANDS:
            env = {"HEADRACE_SERVER": cluster.address} if cluster else {}
            if command.startswith("headrace up"):
                running.close()
                cluster = running.enter_context(started(command))
                seen.append("\n".join(cluster.lines))
            elif "kill -9 PID" in command and cluster:
                story = typed(command.replace("PID", cluster.pids["decode-0"]), **env)
                cluster.read_until("decode-0 ended")
                seen.append(f"{story}\n{cluster.lines[-1]}")
            elif command == EXPERTS:
                seen.append(asked_until_moved(**env))
            else:
                seen.append(typed(command, **env))
    return seen


def test_every_command_of_the_page_does_what_it_says(seen):
    for command, (beginning, says), out in zip(COMMANDS, SAYS, seen, strict=True):
        assert command.startswith(beginning)
        found = " ".join(out.lower().split())
        for part in says:
            assert found.count(part.lower()) >= says.count(part), f"{command}\n{out}"


def test_the_story_is_the_same_beside_a_killed_worker_and_from_a_group_of_ranks(seen):
    stories = [
        out.partition("\n")[0]
        for command, out in zip(COMMANDS, seen, strict=True)
        if command.startswith("headrace generate")
    ]
    assert len(stories) == 3
    assert len(set(stories)) == 1, stories


def test_before_experts_move_ranks_wait_longer_than_they_need(seen):
    before, _ = (waits(out) for command, out in zip(COMMANDS, seen, strict=True) if command.endswith(EXPERTS))
    assert before[0] - before[1] > 100 * LEAST_GAIN, "less would not be worth a move"
