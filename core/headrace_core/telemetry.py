"""Logs and metrics, the same for every process.

A log line is one event: a lowercase phrase, then its data from `extra` as `key=value` (or as JSON fields). Prompt text
and token ids are never logged. Metrics use Prometheus' base units, seconds and bytes; each process keeps its metric
objects in its own `metrics.py` on its own registry, and `serve_metrics` shows them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

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

    def __init__(self, process: str, *, as_json: bool, rank: int | None = None) -> None:
        super().__init__()
        self._process = process
        self._as_json = as_json
        self._common = {} if rank is None else {"rank": rank}

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line; a traceback follows on lines of its own in text."""
        own = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        data: dict[str, Any] = {**self._common, **own}
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


_LEVELS = {name[0]: name for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}
_TEXT_LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3} (" + "|".join(_LEVELS) + ") ")


def level_of(line: str) -> str:
    """Return the level of a line that a process logged, in either format; empty if it is no such line."""
    if match := _TEXT_LINE.match(line):
        return _LEVELS[match[1]]
    if not line.startswith('{"time": '):
        return ""
    try:
        return str(json.loads(line)["level"])
    except (ValueError, KeyError, TypeError):
        return ""


def setup_logging(process: str, *, log_format: str, level: str, rank: int | None = None) -> None:
    """Send every logger's lines to standard error in one format.

    `process` names this process in JSON; `rank`, of a group's, is among every line's data.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(process, as_json=log_format == "json", rank=rank))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # It writes a traceback for each answer that can't be decoded, and then gives None, which `rpc.answered` reports.
    logging.getLogger("grpc._common").addFilter(lambda record: "deserializing" not in record.getMessage())


class _WithRole(Collector):
    """A registry's metrics with the label `role` on every sample, and without the times at which series began."""

    def __init__(self, registry: CollectorRegistry, role: str) -> None:
        self._registry = registry
        self._labels = {"role": role}

    def collect(self) -> Iterator[Metric]:
        """Yield them; called by the registry that is scraped."""
        for metric in self._registry.collect():
            metric.samples = [
                sample._replace(labels=self._labels | sample.labels)
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            yield metric


def with_role(registry: CollectorRegistry, role: str) -> CollectorRegistry:
    """Return a registry that shows what `registry` has, every sample with the label `role`."""
    labelled = CollectorRegistry()
    labelled.register(_WithRole(registry, role))
    return labelled


def serve_metrics(address: str, registry: CollectorRegistry, role: str) -> str:
    """Serve `registry` over HTTP at `host:port` from daemon threads; return the address with the kernel's port.

    Every sample gets the label `role`: processes of all roles are scraped together. `registry` gets what Prometheus
    asks of any process, such as its CPU seconds.

    At most `MAX_SCRAPES` connections are open: the next one closes the oldest, so that connections that never ask, or
    never read, keep nobody from the metrics. One answer is made at a time, as making it competes with the event loop.

    Raises:
        StartupError: BIND, the address can't be bound.
    """
    host, _, port = address.rpartition(":")
    try:
        ProcessCollector(registry=registry)
        server = _MetricsServer(host.strip("[]"), int(port), with_role(registry, role))
    except (OSError, ValueError, OverflowError) as error:
        raise StartupError("BIND", f"can't serve metrics on {address}: {error}") from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return f"{host}:{server.server_port}"


MAX_SCRAPES = 32
_SCRAPE_TIMEOUT_S = 10.0


class _MetricsServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        family, *_, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        self.address_family = family
        self._lock = threading.Lock()
        self._open: dict[socket.socket, None] = {}
        super().__init__((str(address[0]), port), _MetricsHandler)
        self.set_app(_one_at_a_time(make_wsgi_app(registry)))

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a connection's thread; end the oldest one's if there are too many."""
        with self._lock:
            if len(self._open) >= MAX_SCRAPES:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection and close it."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a scraper that went away is no error of ours."""


class _MetricsHandler(WSGIRequestHandler):
    timeout = _SCRAPE_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _one_at_a_time(app: Callable[[Any, Any], Iterable[bytes]]) -> Callable[[Any, Any], Iterable[bytes]]:
    making = threading.Lock()

    def answer(environ: Any, start_response: Any) -> Iterable[bytes]:
        with making:
            return app(environ, start_response)

    return answer
