"""Every command that `headrace up` prints to be pasted, pasted: into a shell that stands elsewhere, while it serves."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from headrace_core.api_keys import ApiKey, new_key, write_entry
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.local_hub import LocalHub

BIN = Path(sys.executable).parent
ENV = {
    **{name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")},
    "COLUMNS": "60",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{BIN}:{os.environ['PATH']}",
}
HAS_IPV6 = Path("/proc/net/if_inet6").exists() and "lo" in Path("/proc/net/if_inet6").read_text()


@dataclass
class Up:
    """A running `headrace up`: what it printed, and the lines that it printed to be pasted."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @property
    def hints(self) -> list[str]:
        return [line.strip() for line in self.lines if line.startswith("  ") and not re.match(r" +\S+ \| ", line)]


@contextmanager
def up(folder: Path, *arguments: str, **env: str) -> Iterator[Up]:
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace_client", "up", "--both", "1", "--metrics-port", "0", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env={**ENV, **env},
        start_new_session=True,
    )  # fmt: skip
    found = Up(process)
    try:
        for line in process.stdout:
            found.lines.append(line)
            if "Ctrl-C stops everything" in line:
                break
        assert process.poll() is None, "".join(found.lines)
        reader = threading.Thread(target=found.lines.extend, args=(process.stdout,))
        reader.start()
        yield found
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0
        reader.join()
        process.stdout.close()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def pasted(hints: list[str], line: str, said: str, folder: Path, key: str) -> subprocess.Popen[str]:
    """Paste a line, and before it the one that asks for a key, if there is one; then type `said`."""
    asks = [hint for hint in hints if hint.startswith("read ")]
    child = subprocess.Popen(
        ["bash", "-c", "\n".join([*asks, line])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=ENV,
        start_new_session=True,
    )  # fmt: skip
    child.stdin.write((f"{key}\n" if asks else "") + said)
    child.stdin.close()
    child.stdin = None  # all is said
    return child


def test_with_keys_certificates_and_any_host_each_hint_works(model_dir, tmp_path):
    home, elsewhere = tmp_path / "a home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    shutil.copytree(model_dir, home / "my model")
    key, digest = new_key("alice")
    (home / "keys.toml").write_text(write_entry(ApiKey("alice", digest)))
    arguments = [
        "--model", "my model", "--tls", "my certs", "--listen", "0.0.0.0:0", "--http-listen", "0.0.0.0:0",
        "--router-option", "keys-file=keys.toml",
    ]  # fmt: skip
    with up(home, *arguments, HEADRACE_API_KEY=key) as running:
        check_hints(running, elsewhere, name="my model", key=key)
        assert "my certs/client" in running.hints[1]


@pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")
def test_at_every_address_of_ipv6_each_hint_works(model_dir, tmp_path):
    with up(tmp_path, "--model", str(model_dir), "--listen", "[::]:0", "--http-listen", "[::]:0") as running:
        check_hints(running, tmp_path, name=str(model_dir))
        assert "[::1]:" in running.hints[0]


def test_of_a_model_by_its_name_on_the_hub_each_hint_works(model_dir, tmp_path):
    with LocalHub({"someone/Tiny": model_dir}) as hub:
        env = hub.environment(tmp_path / "home")
        listen = ("--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0")
        with up(tmp_path, "--model", "someone/Tiny", *listen, **env) as running:
            check_hints(running, tmp_path, name="someone/Tiny")


def check_hints(running: Up, folder: Path, *, name: str, key: str = "") -> None:
    """Paste each line; what it prints must be an answer, and nobody may see the key, if there is one."""
    *_, generate, chat, status, curl = running.hints
    said = "".join(running.lines)
    assert not key or key not in said
    for line in running.lines:
        is_log = re.match(r" *\S+ \| ", line)
        assert is_log or not re.search(r"0\.0\.0\.0|\[::\]", line), line
    for line, typed, answer in (
        (generate, "", r"\w"),
        (chat, "Tell me a story.\n/exit\n", r"forgets, /exit ends\n\S"),
        (curl, "", r'"text":\s*".*data: \[DONE\]'),
    ):
        child = pasted(running.hints, line, typed, folder, key)
        out, err = child.communicate(timeout=WAIT_S)
        assert child.returncode == 0, f"{line}\n{out}\n{err}"
        assert re.search(answer, out, re.DOTALL), f"{line}\n{out}\n{err}"
    child = pasted(running.hints, status, "", folder, key)
    try:
        assert name.rpartition("/")[2] in child.stdout.readline() + child.stdout.readline()
        assert not key or all(key not in line for line in command_lines())
    finally:
        os.killpg(child.pid, signal.SIGINT)
        child.communicate(timeout=WAIT_S)


def command_lines() -> Iterator[str]:
    """Yield what whoever lists this machine's processes sees of each."""
    for folder in Path("/proc").iterdir():
        try:
            yield (folder / "cmdline").read_bytes().decode(errors="replace") if folder.name.isdecimal() else ""
        except OSError:
            continue  # it ended meanwhile
