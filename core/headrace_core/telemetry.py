"""Logs and metrics, the same for every process.

A log line is one event: a lowercase phrase, then its data from `extra` as `key=value` (or as JSON fields). Prompt text
and token ids are never logged. Metrics use Prometheus' base units, seconds and bytes; each process keeps its metric
objects in its own `metrics.py` on its own registry, and `serve_metrics` shows them.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from headrace_core.errors import StartupError

# vLLM's edges for time to first token and inter-token latency, with a fine head below 10 ms.
LATENCY_BUCKETS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.025, 0.04, 0.05, 0.06, 0.075, 0.08, 0.1, 0.15, 0.2,
    0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
"""Edges of TTFT, ITL and TPOT histograms, seconds."""

# vLLM's edges for a request's whole time and its phases, with a fine head below 300 ms.
PHASE_BUCKETS = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0,
    30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
"""Edges of E2E, queue, prefill, transfer and decode time histograms, seconds."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Formatter(logging.Formatter):
    """One line per event, as text for people or as JSON for collectors."""

    def __init__(self, process: str, *, as_json: bool) -> None:
        super().__init__()
        self._process = process
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line; a traceback follows on lines of its own in text."""
        data: dict[str, Any] = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if self._as_json:
            line = {
                "time": round(record.created, 6),
                "level": record.levelname,
                "process": self._process,
                "event": record.getMessage(),
                **data,
            }
            if record.exc_info:
                line["traceback"] = self.formatException(record.exc_info)
            return json.dumps(line, default=str)
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {key}={_text(value)}" for key, value in data.items())
        line = f"{clock}.{int(record.msecs):03d} {record.levelname[0]} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def setup_logging(process: str, *, log_format: str, level: str) -> None:
    """Send every logger's lines to standard error in one format; `process` names this process in JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(process, as_json=log_format == "json"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # It writes a traceback for each answer that can't be decoded, and then gives None, which `rpc.answered` reports.
    logging.getLogger("grpc._common").addFilter(lambda record: "deserializing" not in record.getMessage())


def serve_metrics(address: str, registry: CollectorRegistry) -> str:
    """Serve `registry` over HTTP at `host:port` from a daemon thread; return the address with the kernel's port.

    Raises:
        StartupError: BIND, the address can't be bound.
    """
    host, _, port = address.rpartition(":")
    try:
        server, _ = start_http_server(int(port), host, registry=registry)
    except (OSError, ValueError) as error:
        raise StartupError("BIND", f"can't serve metrics on {address}: {error}") from error
    return f"{host}:{server.server_port}"
