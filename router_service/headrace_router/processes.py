"""Several router processes behind the same ports: the kernel gives each connection to one of them (SO_REUSEPORT).

    parent ── forks ──► children, each a whole router ── all of them serve ──► the parent's ready file
      ├── SIGTERM, SIGINT ──► told to the children; ends when the last has ended
      └── a child ends by itself ──► the others are told to end, and so does the parent, with 1

They share nothing: each has its own queue, connections to workers, limits and metrics, whose port is the one after the
process's before it. The parent serves nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from headrace_core.address import parse_address
from headrace_core.config import RouterSettings

_POLL_S = 0.02
_PR_SET_PDEATHSIG = 1


def divide(settings: RouterSettings) -> RouterSettings:
    """Fork `settings.processes` children; return in each of them, with its own settings, and never in the parent."""
    parent, folder = os.getpid(), tempfile.mkdtemp(prefix="headrace-router-")
    held: list[socket.socket] = []
    shared: dict[str, Any] = {"listen": _reserve(settings.listen, held)}
    if settings.http_listen:
        shared["http_listen"] = _reserve(settings.http_listen, held)
    children: list[int] = []
    for number in range(settings.processes):
        pid = os.fork()
        if not pid:
            _end_with(parent)
            own: dict[str, Any] = {"metrics_listen": _nth_port(settings.metrics_listen, number)}
            if settings.ready_file is not None:
                own["ready_file"] = Path(folder) / str(number)
            return settings.model_copy(update=shared | own)
        children.append(pid)
    _watch(children, settings.ready_file, Path(folder))


def _watch(children: list[int], ready_file: Path | None, folder: Path) -> NoReturn:
    is_stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        del number, frame
        is_stopping = True
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    left, code, is_told = set(children), 0, ready_file is None
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in left:
            left.remove(pid)
            if not is_stopping:
                sys.stderr.write(f"router process {pid} ended by itself; so do the others\n")
                code = 1
                stop(signal.SIGTERM, None)
            code = code or os.waitstatus_to_exitcode(status)
        elif not is_told and ready_file is not None and all((folder / str(i)).exists() for i in range(len(children))):
            _tell(ready_file, [json.loads((folder / str(i)).read_text()) for i in range(len(children))])
            is_told = True
        else:
            time.sleep(_POLL_S)
    os._exit(code)


def _tell(path: Path, ready: list[dict[str, Any]]) -> None:
    """Write the parent's ready file in one piece: a child's, and of all who they are and where their metrics are."""
    metrics = [each["metrics_address"] for each in ready]
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    all_of_them = {"pids": [each["pid"] for each in ready], "metrics_addresses": metrics}
    scratch.write_text(json.dumps({**ready[0], "pid": os.getpid(), **all_of_them}))
    scratch.replace(path)


def _reserve(listen: str, held: list[socket.socket]) -> str:
    """Return the address with its port, which stays this process's; ends the process if it is another's."""
    address = parse_address(listen, least_port=0)
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, place = found[0]
        with socket.socket(family, kind, protocol) as alone:  # shared ports are shared with anybody of this user
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(place)
        keeper = socket.socket(family, kind, protocol)
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        keeper.bind(place)
    except OSError as error:
        sys.stderr.write(f"can't listen on {listen}: {error.strerror or error}\n")
        sys.exit(1)
    held.append(keeper)
    return f"{listen.rpartition(':')[0]}:{keeper.getsockname()[1]}"


def _nth_port(listen: str, number: int) -> str:
    host, _, port = listen.rpartition(":")
    return f"{host}:{int(port) + number if int(port) else 0}"


def _end_with(parent: int) -> None:
    """Let this child end when its parent does, however that ends; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
