"""From settings to a model with its cache, with progress that a person or a log can follow."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from headrace_core.config import WorkerSettings
from headrace_core.engine.executor import StepModel
from headrace_core.engine.finish import ModelLimits
from headrace_core.errors import CheckpointError
from headrace_core.kv.cache import KvCache
from headrace_core.kv.layout import KvLayout
from headrace_core.model.load import load_model

log = logging.getLogger(__name__)

_LOG_INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to step, and what others must know of it."""

    name: str
    model: StepModel
    cache: KvCache
    limits: ModelLimits
    layout: KvLayout
    fingerprint: str
    num_pages: int


def load_worker_model(settings: WorkerSettings) -> LoadedModel:
    """Load the checkpoint and make the page pool; takes long, call it off the event loop.

    Raises:
        CheckpointError: the checkpoint can't be served, or the pool is too small for a page.
    """
    started = time.perf_counter()
    pool_bytes = settings.kv_pool_mib << 20
    with _progress(f"loading {settings.model.name}") as on_progress:
        model = load_model(
            settings.model, dtype=settings.dtype, device="cpu", kv_pool_bytes=pool_bytes, on_progress=on_progress
        )
    layout = model.kv_layout(settings.page_size)
    num_pages = pool_bytes // layout.page_bytes
    if num_pages < 1:
        raise CheckpointError(
            "POOL_TOO_SMALL", f"--kv-pool-mib {settings.kv_pool_mib}: one page takes {layout.page_bytes} bytes"
        )
    config = model.config
    most = min(settings.max_context_tokens or config.max_context_tokens, config.max_context_tokens)
    log.info(
        "model loaded",
        extra={
            "model": settings.model_name or settings.model.resolve().name,
            "fingerprint": model.fingerprint,
            "seconds": time.perf_counter() - started,
            "pages": num_pages,
            "page_bytes": layout.page_bytes,
            "max_context_tokens": most,
        },
    )
    return LoadedModel(
        name=settings.model_name or settings.model.resolve().name,
        model=model,
        cache=KvCache(layout, num_pages, "cpu"),
        limits=ModelLimits(config.vocab_size, most, tuple(config.eos_token_ids)),
        layout=layout,
        fingerprint=model.fingerprint,
        num_pages=num_pages,
    )


@contextlib.contextmanager
def _progress(label: str) -> Generator[Callable[[int, int], None]]:
    """Yield a function of (bytes done, bytes in all): a bar on a terminal, a log line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _log_progress(label)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield show


def _log_progress(label: str) -> Callable[[int, int], None]:
    last_s = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= _LOG_INTERVAL_S:
            last_s = time.monotonic()
            log.info(label, extra={"bytes": done, "total_bytes": total, "percent": round(100 * done / max(total, 1))})

    return show
