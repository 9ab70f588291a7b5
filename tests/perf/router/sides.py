"""What takes turns: our router by HTTP and by gRPC, other projects' routers, and their stub without a router.

Each has a prefill and a decode worker of its own that compute nothing and step at the same pace. Others' routers are
looked for in a virtual environment: `python -m venv .peers/routers; .peers/routers/bin/pip install sglang-router
vllm-router`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace_client.bench.grpc_target import GrpcTarget
from headrace_client.bench.http_target import HttpOptions, HttpTarget
from headrace_client.bench.target import Target
from headrace_client.connection import ConnectionOptions
from headrace_router.testing import write_tokenizer

from tests.perf.cpu_time import cpu_s
from tests.perf.engine.peer import NoPeerError

_START_S = 60.0
_POLL_S = 0.05
_VOCAB_SIZE = 258
_PLACES = 288
"""One in 15 more than there are streams: a router keeps places for other clients."""


@dataclass(frozen=True)
class Side:
    """One that serves now."""

    name: str
    address: str
    command: str
    pid: int
    """Of the router; its children count, too. 0: there is none."""
    model: str = "stub"
    is_grpc: bool = False

    def target(self) -> Target:
        """Return a client."""
        if self.is_grpc:
            return GrpcTarget(self.address, ConnectionOptions(), model="", timeout_s=600.0)
        # An event with text is a token here, and counts in each would cost whoever writes them.
        return HttpTarget(f"http://{self.address}", HttpOptions(self.model, counts_always=False))

    def cpu_s(self) -> float:
        """Return user and system time of the router so far."""
        return cpu_s([self.pid]) if self.pid else 0.0


OURS = "headrace"
OURS_GRPC = "headrace-grpc"
DIRECT = "direct"
SGLANG = "sglang-router"
VLLM = "vllm-router"
NAMES = (OURS, OURS_GRPC, VLLM, SGLANG, DIRECT)


@contextlib.contextmanager
def ours(
    step_ms: float, *, options: Sequence[str] = (), code: Path | None = None, name: str = OURS, places: int = _PLACES
) -> Generator[list[Side]]:
    """Serve by our router, over both of its faces.

    Args:
        step_ms: of the workers.
        options: for the router.
        code: another checkout, whose router it is.
        name: of the side.
        places: sequences that the decode worker runs at once.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = [stack.enter_context(_fake_worker(role, step_ms, places)) for role in ("prefill", "decode")]
        ready = folder / "ready.json"
        words = [sys.executable, "-m", "headrace_router", "--model", str(write_tokenizer(folder / "tiny"))]
        words += ["--workers", ",".join(workers), "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"]
        words += ["--ready-file", str(ready), "--log-level", "WARNING", *options]
        process = stack.enter_context(_process(words, env=_path_of(code)))
        _wait(process, ready.exists)
        addresses = json.loads(ready.read_text())
        command = " ".join(words[1:])
        yield [
            Side(name, addresses["http_address"], command, process.pid, "tiny"),
            Side(f"{name}-grpc", addresses["address"], command, process.pid, "tiny", is_grpc=True),
        ]


@contextlib.contextmanager
def peer(name: str, peers: Path, step_ms: float) -> Generator[list[Side]]:
    """Serve by another project's router, in its mode for prefill and decode workers apart.

    Raises:
        NoPeerError: it is not there, or does not start.
    """
    folder = peers / "routers" / "bin"
    if not (folder / name).exists():
        raise NoPeerError(f"{folder / name} is not there: a virtual environment with {name}")
    with contextlib.ExitStack() as stack:
        prefill, decode = (stack.enter_context(_stub(role, step_ms)) for role in ("prefill", "decode"))
        port, metrics_port = _free_port(), _free_port()
        if name == VLLM:
            words = [str(folder / name), "--vllm-pd-disaggregation", "--prefill", f"http://{prefill}"]
        else:
            words = [str(folder / "python"), "-m", "sglang_router.launch_router", "--pd-disaggregation"]
            words += ["--prefill", f"http://{prefill}", "none"]
        words += ["--decode", f"http://{decode}", "--policy", "round_robin", "--host", "127.0.0.1"]
        words += ["--port", str(port), "--prometheus-port", str(metrics_port), "--log-level", "error"]
        process = stack.enter_context(_process(words, env={}))
        _wait(process, lambda: _answers(port))
        yield [Side(name, f"127.0.0.1:{port}", " ".join(words), process.pid)]


@contextlib.contextmanager
def direct(step_ms: float) -> Generator[list[Side]]:
    """Serve by the stub itself: what its clients see without a router."""
    with _stub("decode", step_ms) as address:
        yield [Side(DIRECT, address, "", 0)]


def _path_of(code: Path | None) -> dict[str, str]:
    if code is None:
        return {}
    roots = ("protos/gen", "core", "kernels", "router_service", "client")
    return {"PYTHONPATH": os.pathsep.join(str(code / root) for root in roots)}


@contextlib.contextmanager
def _fake_worker(role: str, step_ms: float, places: int) -> Generator[str]:
    words = [sys.executable, "-m", "headrace_core.testing.fake_worker", "--role", role]
    words += ["--vocab-size", str(_VOCAB_SIZE), "--max-step-sequences", str(places)]
    with _said([*words, "--step-ms", str(step_ms)]) as address:
        yield address


@contextlib.contextmanager
def _stub(role: str, step_ms: float) -> Generator[str]:
    words = [sys.executable, "-m", "tests.perf.router.http_stub", "--role", role, "--step-ms", str(step_ms)]
    with _said(words) as address:
        yield address


@contextlib.contextmanager
def _said(words: list[str]) -> Generator[str]:
    with _process(words, env={}) as process:
        assert process.stdout is not None, "a pipe"
        yield process.stdout.readline().decode().strip()


@contextlib.contextmanager
def _process(words: list[str], *, env: dict[str, str]) -> Generator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, env=os.environ | env)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None, "a pipe"
            process.stdout.close()


def _wait(process: subprocess.Popen[bytes], is_ready) -> None:
    until_s = time.monotonic() + _START_S
    while not is_ready():
        if process.poll() is not None:
            raise NoPeerError(f"it ended with {process.returncode}")
        if time.monotonic() > until_s:
            raise NoPeerError(f"it was not ready after {_START_S:.0f} s")
        time.sleep(_POLL_S)


def _answers(port: int) -> bool:
    """Return whether a router completes something, which also says that it knows its workers."""
    fields = {"model": "stub", "prompt": "x", "max_tokens": 1, "stream": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(fields).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
