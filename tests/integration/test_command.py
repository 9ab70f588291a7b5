"""The `headrace` command as a person types it: `up`, 32 times `generate` at once, a killed worker, Ctrl-C."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from headrace_client import AsyncClient
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.cluster_checks import all_pages_free

PROMPT = "Once upon a time there was a little fox named Zorvim."
ENV = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "headrace_client", *arguments]


@pytest.fixture
def up(model_dir):
    """`headrace up` on a free port with two workers of each kind; yields its process and its address."""
    process = subprocess.Popen(
        command(
            "up", "--model", str(model_dir), "--prefill", "2", "--decode", "2", "--dtype", "float32",
            "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0",
        ),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV, start_new_session=True,
    )  # fmt: skip
    lines = []
    reader = None
    try:
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"headrace generate --server (\S+:\d+)", line):
                break
        else:
            pytest.fail("`headrace up` ended early:\n" + "".join(lines))
        # Read on: `up` stops when its pipe is full, and its workers with it.
        reader = threading.Thread(target=lines.extend, args=(process.stdout,))
        reader.start()
        yield process, found[1], lines
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if reader:
            reader.join()
        process.stdout.close()


def pids_of(lines, role):
    """Read pids from the lines that `up` shows when each process is ready."""
    return [int(found[1]) for line in lines if (found := re.match(rf"{role}(?:-\d+)? is ready at .*pid (\d+)", line))]


async def generate(address, prompt, max_tokens):
    process = await asyncio.create_subprocess_exec(
        *command(
            "generate", prompt, "--server", address, "--temperature", "0", "--max-tokens", str(max_tokens), "--json"
        ),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return json.loads(out)


def test_32_generates_equal_transformers_while_a_prefill_worker_is_killed(up, reference):
    process, address, lines = up
    prompts = [PROMPT + " The fox lived in the forest with a bear." * (i % 16) for i in range(32)]
    most = [8 + 3 * i for i in range(32)]

    async def main():
        tasks = [asyncio.create_task(generate(address, *request)) for request in zip(prompts, most, strict=True)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        os.kill(pids_of(lines, "prefill")[0], signal.SIGKILL)
        results = await asyncio.gather(*tasks)
        async with AsyncClient(address) as client:
            await all_pages_free(client.server_info)
        return results

    for prompt, max_tokens, result in zip(prompts, most, asyncio.run(main()), strict=True):
        assert result["samples"][0]["token_ids"] == reference.greedy(reference.tokenize(prompt), max_tokens)

    if shutil.which("curl"):
        (line,) = [line for line in lines if line.startswith("  curl ")]
        told = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True, timeout=WAIT_S).stdout
        assert told.endswith("data: [DONE]\n\n")

    status = subprocess.run(command("status", "--server", address, "--json"), capture_output=True, env=ENV, check=True)
    ready = [worker for worker in json.loads(status.stdout)["workers"] if worker["state"] == "ready"]
    assert len(ready) == 3
    for worker in ready:
        assert worker["num_free_pages"] == worker["num_pages"]
        assert worker["num_leases"] == 0

    process.send_signal(signal.SIGINT)
    process.wait(WAIT_S)
    assert process.returncode in (0, 130)
    pids = {role: pids_of(lines, role) for role in ("router", "prefill", "decode")}
    assert [len(pids[role]) for role in pids] == [1, 2, 2]
    for role in pids:
        for pid in pids[role]:
            assert not os.path.exists(f"/proc/{pid}"), f"{role} {pid} outlived `headrace up`"


def test_demo_tells_a_story_and_where_its_time_went(model_dir):
    done = subprocess.run(command("demo"), capture_output=True, text=True, env=ENV, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("prefill", "transfer", "decode", "Handed off", "KiB", "headrace up"):
        assert word in done.stdout, word
