"""The commands of docs/tutorial.md, typed as they stand there, against the cluster that its second command starts."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^```sh\n(.*?)\n```$", (ROOT / "docs/tutorial.md").read_text(), re.DOTALL | re.MULTILINE)
(UP,) = (command for command in COMMANDS if command.startswith("headrace up"))
ENV = {
    **os.environ,
    "COLUMNS": "120",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
SAYS = {
    "headrace doctor": ("CPU", "torch"),
    "headrace generate": ("Zorvim", "Time to the first token", "Handed off"),
    "headrace status": ("prefill", "unreachable"),
    "for dataset": 4 * ("Serving Benchmark Result",),
    "headrace experts": ("layer", "ranks"),
    "headrace roofline": ("DECODE", "FLOP"),
    "headrace plan": ("prefill", "decode", "GPUs"),
}
"""What a command's output has in it, by its beginning."""


def typed(command: str, **env: str) -> str:
    """Return what `command` prints; it must succeed."""
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env={**ENV, **env}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster():
    """The second command on free ports; yields the router's address and the pids of processes by name."""
    command = f"exec {UP} --listen 127.0.0.1:0 --http-listen 127.0.0.1:0 --metrics-port 0"
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    pids, address = {}, ""
    for line in process.stdout:
        if found := re.match(r"(\S+) is ready at .*pid (\d+)", line):
            pids[found[1]] = int(found[2])
        if found := re.search(r"headrace generate --server (\S+:\d+)", line):
            address = found[1]
        if "Ctrl-C stops everything" in line:
            break
    yield address, pids
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 0


def test_there_are_nine():
    assert len(COMMANDS) == 9
    assert len({command for command in COMMANDS if command != UP and any(map(command.startswith, SAYS))}) == 8


def test_each_command_does_what_the_page_says(cluster):
    address, pids = cluster
    assert sorted(pids) == ["decode-0", "decode-1", "prefill-0", "router"]
    stories = []
    for command in COMMANDS:
        if command == UP:
            continue
        out = typed(command.replace("PID", str(pids["decode-0"])), HEADRACE_SERVER=address)
        wanted = next(says for beginning, says in SAYS.items() if command.startswith(beginning))
        if "kill -9" in command:
            wanted = ()
            stories.append(out)
        if "--timings" in command:
            stories.append(out)
        for part in wanted:
            assert part.lower() in out.lower(), f"{command}\n{out}"
    whole, killed = (story.partition("\n")[0] for story in stories)
    assert whole == killed
