"""What is served beside each other: Headrace in two deployments, and vLLM's server; all on the same cores.

vLLM is looked for as vllm/bin/python in the folder of peers, as in `tests.perf.engine`; where the processor has no
bfloat16 it gets the weights in float32, which it multiplies many times faster there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

from headrace_client import AsyncClient
from headrace_client.bench.http_target import HttpOptions, HttpTarget
from headrace_client.cluster.local_cluster import LocalCluster

from tests.perf.closed_loop import Ask, asking, asking_target
from tests.perf.cpu_time import cpu_s, family
from tests.perf.engine.peer import NoPeerError, peers_dtype, threads_of

_START_S = 900.0
_POLL_S = 0.5
_LAST_LINES = 5


@dataclass(frozen=True)
class Load:
    """What is asked of each: tokens in and out, the most clients at once, and the cores there are."""

    checkpoint: Path
    num_in: int
    num_out: int
    most_clients: int
    cores: int


@dataclass(frozen=True)
class Server:
    """A deployment that serves now. `pids` are its processes; of each its children count, too."""

    ask: Ask
    command: str
    pids: Callable[[], Iterable[int]]

    def cpu_s(self) -> float:
        """Return user and system time of all its processes so far."""
        return cpu_s(self.pids())


@contextlib.asynccontextmanager
async def apart(load: Load) -> AsyncGenerator[Server]:
    """Serve with one prefill and one decode worker, each on its share of the cores."""
    threads = max(1, load.cores // 2)
    async with _headrace(load, threads, num_prefill=1, num_decode=1, num_both=0) as server:
        yield server


@contextlib.asynccontextmanager
async def together(load: Load) -> AsyncGenerator[Server]:
    """Serve with one worker that does both, on all cores."""
    async with _headrace(load, load.cores, num_prefill=0, num_decode=0, num_both=1) as server:
        yield server


@contextlib.asynccontextmanager
async def _headrace(
    load: Load, threads: int, *, num_prefill: int, num_decode: int, num_both: int
) -> AsyncGenerator[Server]:
    options = {
        "threads": threads,
        "max-context-tokens": load.num_in + load.num_out + 1,
        # One more, and one in 15: a router keeps slots for other clients (`headrace_router.policy`).
        "max-step-sequences": load.most_clients * 16 // 15 + 1,
        "kv-pool-mib": 1024,
    }
    with LocalCluster(
        load.checkpoint, num_prefill, num_decode, num_both, worker_options=options, env=threads_of(threads)
    ) as cluster:
        shown = f"{num_prefill} prefill, {num_decode} decode, {num_both} both, {options}"
        async with AsyncClient(cluster.router_address) as client:
            yield Server(asking(client, load.num_out), shown, lambda: [each.pid for each in cluster.processes])


def vllm(peers: Path) -> Callable[[Load], contextlib.AbstractAsyncContextManager[Server]]:
    """Return what serves with vLLM on all cores; entering it raises NoPeerError where it is not to be had."""

    @contextlib.asynccontextmanager
    async def serve(load: Load) -> AsyncGenerator[Server]:
        python = peers / "vllm" / "bin" / "python"
        if not python.exists():
            raise NoPeerError(f"{python} is not there: a virtual environment with vLLM for CPUs")
        port = _free_port()
        words = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(load.checkpoint)]
        words += ["--port", str(port), "--dtype", peers_dtype(), "--max-num-seqs", str(load.most_clients)]
        words += ["--max-model-len", str(load.num_in + load.num_out + 1), "--no-enable-prefix-caching"]
        # It keeps one core for itself unless told which it may have.
        own = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{load.cores - 1}" if load.cores > 1 else "0"}
        own |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        with (
            tempfile.TemporaryDirectory() as folder,
            _serving(
                [*words, "--tokenizer", _tokenizer(load, Path(folder))], threads_of(load.cores) | own, port
            ) as process,
        ):
            target = HttpTarget(f"http://127.0.0.1:{port}", HttpOptions(str(load.checkpoint)))
            yield Server(asking_target(target, load.num_out), " ".join(words), lambda: [process.pid])
            await target.close()

    return serve


def _tokenizer(load: Load, folder: Path) -> str:
    """Return a folder with the checkpoint's tokenizer as transformers reads one, too."""
    shutil.copy(load.checkpoint / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return str(folder)


@contextlib.contextmanager
def _serving(words: list[str], env: dict[str, str], port: int) -> Generator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=env)
        try:
            _wait_ready(process, port, log)
            yield process
        finally:
            for pid in family(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def _wait_ready(process: subprocess.Popen[bytes], port: int, log) -> None:
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            log.seek(0)
            said = " ".join(log.read().splitlines()[-_LAST_LINES:])
            raise NoPeerError(f"vLLM's server ended with {process.returncode}: {said}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        time.sleep(_POLL_S)
    raise NoPeerError(f"vLLM's server was not ready after {_START_S:.0f} s")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
