"""A service process from start to exit.

    STARTING ──► SERVING ──SIGTERM/SIGINT──► DRAINING ──idle or drain_s──► STOPPED (exit 0)
        │           └──────service.failed────────────────────────────────► STOPPED (exit 1)
        └── an error while starting (exit 2, one readable line)
A signal while starting, imports included, ends it with 0 as well: `signals.exit_on`, until `run` listens itself. A
second signal while draining exits at once (130). What does not stop in time ends with the process, by the same code.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, Protocol

import uvloop
from prometheus_client import CollectorRegistry

from headrace_core import __version__
from headrace_core.config import ProcessSettings
from headrace_core.errors import HeadraceError, StartupError
from headrace_core.rpc import MAX_CONNECTIONS
from headrace_core.telemetry import serve_metrics, setup_logging

log = logging.getLogger(__name__)

_STOP_GRACE_S = 2.0
_ENOUGH_FILES = 2 * MAX_CONNECTIONS
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST_MMAP_THRESHOLD = 32 << 20


class Service(Protocol):
    """What `run` needs of a service. Made and called on the event loop."""

    registry: CollectorRegistry
    """Its metrics; served from before `start`."""
    metrics_port: int
    """Where they are served; set before `start`."""
    addresses: Mapping[str, str]
    """Where else it serves, by the name of the ready file; read after `start`."""
    failed: asyncio.Future[None]
    """Done when the process can't go on; a result or an exception, either ends it with exit code 1."""

    async def start(self) -> str:
        """Bind, load, become ready; return the address served. Called once.

        Raises:
            HeadraceError: it can't serve; the message goes to the user, and the process exits with 2.
        """
        ...

    async def drain(self) -> None:
        """Say NOT_SERVING, refuse new work, return when no work is left. Called at most once, after `start`."""
        ...

    async def stop(self) -> None:
        """Cancel what is left and free everything. Called once, also after a failed `start`."""
        ...


def run(factory: Callable[[], Service], settings: ProcessSettings, *, role: str, rank: int | None = None) -> NoReturn:
    """Run the service that `factory` makes until a signal or its failure; does not return.

    Args:
        factory: called on the event loop; may raise HeadraceError, as `Service.start` may.
        settings: addresses, log format, ready file, drain time.
        role: `router`, `prefill`, `decode` or `both`; for logs and the ready file.
        rank: of a group's process, for logs.
    """
    setup_logging(role, log_format=settings.log_format, level=settings.log_level, rank=rank)
    raise_file_limit()
    code = uvloop.run(_run(factory, settings, role))
    # Not sys.exit: a library thread that does not end must not keep a drained process alive.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def raise_file_limit() -> None:
    """Let this process open as many files as it may; connections are files. Warns if those are few for a server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a hard limit may be more than the system grants
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft != resource.RLIM_INFINITY and soft < _ENOUGH_FILES:
        log.warning("few files may be opened, so few may connect; raise `ulimit -n`", extra={"files": soft})


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc); elsewhere do nothing."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def keep_freed_memory(num_bytes: int = 64 << 20) -> None:
    """Keep up to so much freed memory for what is allocated next, where the C library can (glibc).

    A worker allocates and frees frames of a megabyte all the time. By itself glibc gives them back at once, and the
    kernel zeroes each of their pages again: a third of what moving pages by gRPC costs.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_M_MMAP_THRESHOLD, min(num_bytes, _MOST_MMAP_THRESHOLD))
            set_option(_M_TRIM_THRESHOLD, num_bytes)


def use_huge_pages() -> None:
    """Let torch's larger tensors lie on huge pages, where the kernel gives them to whom asks (`madvise`); before torch.

    A decode step on a CPU reads all weights once: with pages of 4 KiB the look-up of their addresses is a tenth of it,
    and more. THP_MEM_ALLOC_ENABLE=0 in the environment turns it off.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


async def _run(factory: Callable[[], Service], settings: ProcessSettings, role: str) -> int:
    stopping = _signals()
    try:
        if settings.ready_file:
            _try_ready(settings.ready_file)  # not only when a large model is loaded
        service = factory()
    except HeadraceError as error:
        return _refuse(error)
    try:
        metrics_address = serve_metrics(settings.metrics_listen, service.registry, role)
        service.metrics_port = int(metrics_address.rpartition(":")[2])
        address = await _start(service, stopping)
        if address is None:
            await _stop(service, settings)
            return 0
        if settings.ready_file:
            addresses = {"address": address, "metrics_address": metrics_address, **service.addresses}
            _write_ready(settings.ready_file, role, addresses)
    except HeadraceError as error:
        code = _refuse(error)  # first: to stop may take as long as it may
        await _stop(service, settings)
        return code
    # What is there now stays. From here on a full collection, for which every stream waits, looks at newer things: of a
    # router's modules alone it took 80 ms and more.
    gc.collect()
    gc.freeze()
    where = {"address": address, "metrics": metrics_address, **service.addresses}
    log.info("serving", extra={"role": role, **where, "version": __version__})
    await asyncio.wait([service.failed, stopping], return_when=asyncio.FIRST_COMPLETED)
    if service.failed.done():
        error = service.failed.exception()
        if isinstance(error, HeadraceError):  # it says all there is to say
            log.error("failed", extra={"reason": error.reason, "problem": str(error)})
        else:
            log.error("failed", exc_info=error)
        await _stop(service, settings)
        return 1
    log.info("draining", extra={"drain_s": settings.drain_s})
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(service.drain(), settings.drain_s)
    await _stop(service, settings)
    return 0


async def _stop(service: Service, settings: ProcessSettings) -> None:
    limit_s = settings.drain_s + _STOP_GRACE_S
    try:
        await asyncio.wait_for(service.stop(), limit_s)
    except TimeoutError:
        log.warning("stopping took too long; what is left ends with the process", extra={"limit_s": limit_s})
    except Exception as error:
        log.error("unhandled error while stopping", exc_info=error)
    else:
        log.info("stopped")


def _refuse(error: HeadraceError) -> int:
    log.error("can't start", extra={"reason": error.reason, "problem": str(error)})
    return 2


async def _start(service: Service, stopping: asyncio.Future[None]) -> str | None:
    """Start, unless a signal comes first: then return None."""
    starting = asyncio.ensure_future(service.start())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        return starting.result()
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    return None


def _signals() -> asyncio.Future[None]:
    """Return a future that the first SIGTERM or SIGINT resolves; the second ends the process."""
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()

    def on_signal() -> None:
        if stopping.done():
            os._exit(130)
        stopping.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stopping


def _try_ready(path: Path) -> None:
    """See if the ready file can be written, but leave none.

    Raises:
        StartupError: READY_FILE.
    """
    _in_one_piece(path, "", is_trial=True)


def _write_ready(path: Path, role: str, addresses: Mapping[str, str]) -> None:
    """Write the ready file in one piece, so that a reader never sees half of it. Raises as `_try_ready` does."""
    _in_one_piece(path, json.dumps({"role": role, **addresses, "pid": os.getpid()}))


def _in_one_piece(path: Path, text: str, *, is_trial: bool = False) -> None:
    try:
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        scratch.write_text(text)
        if is_trial:
            scratch.unlink()
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder")
        else:
            scratch.replace(path)
    except (OSError, ValueError) as error:
        raise StartupError("READY_FILE", f"the ready file {path} can't be written: {error}") from None
