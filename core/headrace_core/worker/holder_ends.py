"""Where a worker's pages can be read: one end for each transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headrace_core.transfer.lease import LeaseTable
from headrace_core.transfer.transport import HolderEnd, Holding
from headrace_core.transfer.transports import TRANSPORTS
from headrace_core.worker.host import WorkerHost
from headrace_core.worker.metrics import WorkerMetrics


def holder_ends(
    host: WorkerHost[Any],
    metrics: WorkerMetrics,
    transports: Sequence[str],
    *,
    frame_bytes: int,
    leases: Callable[[], LeaseTable],
) -> list[HolderEnd]:
    """Return the ends at which the pages of `host`'s model are read, under `leases`; the model may come later."""
    return [
        TRANSPORTS[name].holder(
            Holding(
                holder=leases,
                memory=lambda: host.model.pages,
                incarnation=host.incarnation,
                frame_bytes=frame_bytes,
                on_sent=metrics.transfer_bytes.labels(name, "sent").inc,
                shared=lambda: host.model.memory,
            )
        )
        for name in transports
    ]
