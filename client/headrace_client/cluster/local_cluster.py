"""A whole cluster on this machine: router and workers as real processes, for the command, the tests, the benchmarks.

    with LocalCluster(model_dir, num_prefill=1, num_decode=2) as cluster:
        client = Client(cluster.router_address)

All start side by side; each listens on a port that the kernel chose and says so in a ready file. The router learns
its workers from a file that is written when they serve, and again when one is added. Every child ends when the process
that made the cluster ends, however it ends (`child_process`). A worker of several ranks is as many processes, told
their places as torchrun would; the first is the worker for everybody else, and has its name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from headrace.v1 import generation_service_pb2, generation_service_pb2_grpc
from headrace_core import identity
from headrace_core.errors import HeadraceError, InvalidRequestError, UnavailableError
from headrace_core.packages import check_worker_packages
from headrace_core.rpc import blocking_channel

from headrace_client.cluster.cluster_process import ClusterProcess, LogSink, Role
from headrace_client.cluster.cores import available_cores
from headrace_client.cluster.rank_places import check_ranks, rank_environments

Options = Mapping[str, str | int | float | bool | Path]
"""Settings of a process by option name without dashes in front: {"max-step-tokens": 512}."""

PROGRAMS: Mapping[Role, Sequence[str]] = {
    "router": ("-m", "headrace_router"),
    "prefill": ("-m", "headrace_prefill"),
    "decode": ("-m", "headrace_decode"),
    "both": ("-m", "headrace_decode"),
}
STOP_GRACE_S = 15.0

_POLL_S = 0.02
_STATUS_TIMEOUT_S = 2.0


def no_options() -> Options:
    """Return no options; a default for dataclass fields."""
    return {}


@dataclass(eq=False)
class LocalCluster:
    """Router and workers on this machine. A context manager; one thread at a time.

    Each process's options are `router_options` or `worker_options`, over which `prefill_options` and `decode_options`
    (decode and colocated workers) win. `log_sink` gets every line that a child prints, from the child's reader thread;
    `on_ready` gets each process when it serves, from the thread that starts it. `wait_for_workers` makes `start` return
    only when the router says that every worker is ready; it is not done when the router has certificates of its own.
    `api_key` is shown to a router that asks for one, to see what it has.
    `metrics_port`: where the router serves metrics, the workers on the ports after it; 0: the kernel chooses each.
    `tls` is a folder of identities as `certificates.make_set` makes it: then every hop is encrypted. A prefill worker
    is `prefill_ranks` processes, any other `decode_ranks`.
    """

    model_dir: Path
    num_prefill: int = 1
    num_decode: int = 1
    num_both: int = 0
    router_options: Options = field(default_factory=no_options)
    worker_options: Options = field(default_factory=no_options)
    prefill_options: Options = field(default_factory=no_options)
    decode_options: Options = field(default_factory=no_options)
    log_sink: LogSink | None = None
    on_ready: Callable[[ClusterProcess], None] | None = None
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    start_timeout_s: float = 180.0
    wait_for_workers: bool = True
    api_key: str = field(default="", repr=False)
    metrics_port: int = 0
    tls: Path | None = None
    programs: Mapping[Role, Sequence[str]] = field(default_factory=lambda: PROGRAMS)
    prefill_ranks: int = 1
    decode_ranks: int = 1

    processes: list[ClusterProcess] = field(default_factory=list[ClusterProcess], init=False)
    """Every process ever started, in that order; also those that ended."""
    _folder: Path | None = field(default=None, init=False)
    _spawner: ThreadPoolExecutor | None = field(default=None, init=False)
    _registered: list[str] = field(default_factory=list[str], init=False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def router(self) -> ClusterProcess:
        """The router that runs now."""
        return next(process for process in reversed(self.processes) if process.role == "router")

    @property
    def router_address(self) -> str:
        """`host:port` for clients."""
        return self.router.address

    @property
    def workers(self) -> list[ClusterProcess]:
        """Every worker ever started; of a group of ranks the first."""
        return [process for process in self.processes if process.role != "router" and not process.rank]

    def ranks(self, worker: ClusterProcess) -> list[ClusterProcess]:
        """Return the processes that are `worker`, itself first."""
        index = self.processes.index(worker)
        return self.processes[index : index + self._num_ranks(worker.role)]

    @property
    def num_workers(self) -> int:
        """How many workers it starts with."""
        return self.num_prefill + self.num_decode + self.num_both

    def threads_each(self) -> int:
        """Return how many of this machine's cores each process of a worker computes on."""
        num_ranks = self.num_prefill * self.prefill_ranks + (self.num_decode + self.num_both) * self.decode_ranks
        return max(1, available_cores() // num_ranks)

    def start(self) -> None:
        """Start everything and return when it serves; on an error nothing is left running.

        Raises:
            StartupError: NO_WORKER_PACKAGES.
            InvalidRequestError: BAD_CLUSTER, these processes can't serve anything; NO_MODEL, `model_dir` is none.
            StartupError: BAD_RANKS, so many ranks can't share the model.
            UnavailableError: START_FAILED with the failing process's last lines; START_TIMEOUT.
        """
        check_worker_packages()
        self.check_counts()
        self._check_model()
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-"))
        # The kernel's parent is a thread: children must be started from one that lives as long as they do.
        self._spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cluster-spawner")
        try:
            counts: dict[Role, int] = {"prefill": self.num_prefill, "decode": self.num_decode, "both": self.num_both}
            workers = [self._spawn(role) for role, count in counts.items() for _ in range(count)]
            self._write_workers([])
            self._wait_ready([*workers, self._spawn("router", {"workers-file": self._path("workers")})])
            self._write_workers([process.address for process in workers])
            self._wait_registered()
        except BaseException:
            self.stop()
            raise

    def add_prefill(self) -> ClusterProcess:
        """Start one more prefill worker and return when the router has it. Raises as `start` does."""
        return self._add("prefill")

    def add_decode(self) -> ClusterProcess:
        """Start one more decode worker and return when the router has it. Raises as `start` does."""
        return self._add("decode")

    def restart(self, process: ClusterProcess) -> ClusterProcess:
        """Start a successor of an ended process, with all its ranks, at its address; return it when it serves.

        Raises as `start` does.
        """
        assert process.poll() is not None, f"{process.name} still runs"
        options: dict[str, Any] = {"listen": process.address}
        if self.metrics_port:
            options["metrics-listen"] = process.metrics_address
        if process.role == "router":
            options["workers-file"] = self._path("workers")
        successor = self._spawn(process.role, options)
        self._wait_ready([successor])
        self._wait_registered()
        return successor

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """End every process: SIGTERM, up to `grace_s` to drain, SIGKILL. The router first, so that work can finish.

        Safe to call twice.
        """
        for is_router in (True, False):
            _end([process for process in self.processes if (process.role == "router") is is_router], grace_s)
        if self._spawner:
            self._spawner.shutdown()
            self._spawner = None
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def kill(self) -> None:
        """End every process at once."""
        self.stop(grace_s=0.0)

    @property
    def asks_for_keys(self) -> bool:
        """Whether clients of the router must show a key."""
        return self._has("keys-file")

    @property
    def has_certificate(self) -> bool:
        """Whether the router has one of its own, in place of that in `tls`."""
        return self._has("tls-cert")

    def first_names(self) -> list[str]:
        """Return the names of the processes that `start` starts."""
        counts = {"prefill": self.num_prefill, "decode": self.num_decode, "both": self.num_both}
        return [*(f"{role}-{index}" for role, count in counts.items() for index in range(count)), "router"]

    def check_counts(self) -> None:
        """Refuse what can't serve. Raises InvalidRequestError, BAD_CLUSTER."""
        counts = (self.num_prefill, self.num_decode, self.num_both)
        if min(counts) < 0 or not (self.num_both or (self.num_prefill and self.num_decode)):
            raise InvalidRequestError(
                "BAD_CLUSTER",
                f"{self.num_prefill} prefill, {self.num_decode} decode and {self.num_both} colocated workers can't "
                "serve: give at least one prefill and one decode worker, or one that does both",
            )

    def _check_model(self) -> None:
        if not (self.model_dir / "config.json").is_file():
            raise InvalidRequestError(
                "NO_MODEL", f"{self.model_dir} is not a model: it needs config.json, *.safetensors and tokenizer.json"
            )
        if self.num_prefill:
            check_ranks(self.model_dir, self.prefill_ranks, self.options("prefill"))
        check_ranks(self.model_dir, self.decode_ranks, self.options("decode"))

    def _num_ranks(self, role: Role) -> int:
        return {"router": 1, "prefill": self.prefill_ranks}.get(role, self.decode_ranks)

    def _add(self, role: Role) -> ClusterProcess:
        process = self._spawn(role)
        self._wait_ready([process])
        self._write_workers([*self._registered, process.address])
        self._wait_registered()
        return process

    def _spawn(self, role: Role, options: Options | None = None) -> ClusterProcess:
        """Start a process, or all ranks of a worker; return the first."""
        assert self._spawner, "the cluster is not running"
        name = f"{role}-{sum(process.role == role for process in self.workers)}" if role != "router" else role
        ready_file = self._path(f"{len(self.processes)}.ready")
        merged = {**self.options(role), **(options or {}), "ready-file": ready_file}
        places = rank_environments(self._num_ranks(role))
        for rank, place in enumerate(places):
            process = self._spawner.submit(
                ClusterProcess,
                f"{name}.{rank}" if rank else name,
                role,
                command=[*self.programs[role], *arguments(merged)],
                env={**os.environ, **self._environment(), **self.env, **place},
                ready_file=ready_file,
                log_sink=self.log_sink,
                rank=rank,
            ).result()
            self.processes.append(process)
        return self.processes[-len(places)]

    def options(self, role: Role) -> dict[str, Any]:
        """Return what the next process of this role is started with, but the file by which it says that it serves."""
        port = self.metrics_port and self.metrics_port + (0 if role == "router" else 1 + len(self.workers))
        common: dict[str, Any] = {
            "model": self.model_dir,
            "listen": "127.0.0.1:0",
            "metrics-listen": f"127.0.0.1:{port}",
        }
        if self.tls:
            common["tls"] = self.tls / ("decode" if role == "both" else role)
        if role == "router":
            return {**common, **self.router_options}
        worker: dict[str, Any] = {**common, "threads": self.threads_each(), **self.worker_options}
        if role == "prefill":
            return {**worker, **self.prefill_options}
        return {**worker, "role": role, **self.decode_options}

    def _environment(self) -> dict[str, str]:
        """Keep the compute libraries of several processes from fighting over the cores."""
        threads = str(self.threads_each())
        return {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            "KMP_BLOCKTIME": "0",
            "PYTHONUNBUFFERED": "1",
        }

    def _path(self, name: str) -> Path:
        assert self._folder, "the cluster is not running"
        return self._folder / name

    def _write_workers(self, addresses: list[str]) -> None:
        self._registered = addresses
        scratch = self._path("workers.new")
        scratch.write_text("".join(f"{address}\n" for address in addresses))
        scratch.replace(self._path("workers"))

    def _wait_ready(self, started: Sequence[ClusterProcess]) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        waiting = list(started)
        while waiting:
            for process in (rank for worker in waiting for rank in self.ranks(worker)):
                if process.poll() is not None:
                    raise UnavailableError("START_FAILED", f"{process.name} {process.problem()}")
            ready = [process for process in waiting if process.read_ready()]
            waiting = [process for process in waiting if process not in ready]
            for process in ready:
                if self.on_ready:
                    self.on_ready(process)
            if waiting and time.monotonic() > deadline:
                raise UnavailableError(
                    "START_TIMEOUT",
                    f"{waiting[0].name} was not ready after {self.start_timeout_s:.0f} s; {waiting[0].last_words()}",
                )
            if waiting:
                time.sleep(_POLL_S)

    def _operator(self) -> identity.Identity:
        assert self.tls, "there are identities"
        return identity.Identity(self.tls / identity.Role.OPERATOR.value, identity.Role.OPERATOR)

    def _has(self, name: str) -> bool:
        """Return whether the router was given a setting by others than this class."""
        return name in self.router_options or f"HEADRACE_ROUTER_{name.replace('-', '_').upper()}" in os.environ

    def _wait_registered(self) -> None:
        """Wait until the router says that every running worker is ready."""
        if not self.wait_for_workers or self.has_certificate or (self._has("tls") and not self.tls):
            return
        wanted = {process.address for process in self.workers if process.poll() is None}
        deadline = time.monotonic() + self.start_timeout_s
        tls = self._operator().to_router() if self.tls else None
        with blocking_channel(self.router_address, tls=tls) as channel:
            while missing := wanted - _ready_workers(channel, self.api_key):
                if self.router.poll() is not None:
                    raise UnavailableError("START_FAILED", f"the router ended; {self.router.last_words()}")
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        "START_TIMEOUT",
                        f"the router did not take {', '.join(sorted(missing))} in {self.start_timeout_s:.0f} s; "
                        f"{self.router.last_words()}",
                    )
                time.sleep(_POLL_S)


def _ready_workers(channel: grpc.Channel, api_key: str) -> set[str]:
    """Return the addresses that the router would send work to; none while it does not answer."""
    stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
    metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    request = generation_service_pb2.GetServerInfoRequest()
    try:
        info = stub.GetServerInfo(request, timeout=_STATUS_TIMEOUT_S, metadata=metadata)
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return set()
        raise HeadraceError("START_FAILED", f"the router answers with {error.code().name}: {error.details()}") from None
    return {worker.address for worker in info.workers if worker.state == "ready"}


def arguments(options: Options) -> list[str]:
    """Return options as a command line has them."""
    arguments: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments += [f"--{name}", str(value)]
    return arguments


def _end(processes: Sequence[ClusterProcess], grace_s: float) -> None:
    for process in processes:
        if grace_s:
            process.terminate()
    deadline = time.monotonic() + grace_s
    for process in processes:
        if not process.wait(max(0.0, deadline - time.monotonic())):
            process.kill()
            process.wait()
        process.close()
