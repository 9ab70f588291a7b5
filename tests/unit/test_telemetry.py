import contextlib
import json
import logging
import socket
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from headrace_core import telemetry
from headrace_core.errors import HeadraceError
from headrace_core.testing.async_test import WAIT_S
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.registry import Collector


@pytest.fixture(autouse=True)
def _restore_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_text_line_holds_the_event_and_its_data(capsys):
    telemetry.setup_logging("router", log_format="text", level="INFO")
    logging.getLogger("x").info("request finished", extra={"request_id": "r1", "ttft_s": 0.25})
    assert capsys.readouterr().err.strip().endswith("I request finished request_id=r1 ttft_s=0.25")


def test_a_json_line_is_one_object(capsys):
    telemetry.setup_logging("router", log_format="json", level="INFO")
    logging.getLogger("x").warning("worker lost", extra={"address": "a:1"})
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["address"], line["level"], line["process"]) == (
        "worker lost",
        "a:1",
        "WARNING",
        "router",
    )


@pytest.mark.parametrize(
    ("log_format", "said"), [("text", " I ready rank=1 pages=3"), ("json", '"rank": 1, "pages": 3}')]
)
def test_every_line_of_a_groups_process_says_its_rank(capsys, log_format, said):
    telemetry.setup_logging("decode", log_format=log_format, level="INFO", rank=1)
    logging.getLogger("x").info("ready", extra={"pages": 3})
    assert capsys.readouterr().err.strip().endswith(said)


def test_metrics_are_served_with_the_role_and_without_when_they_began():
    registry = CollectorRegistry()
    Counter("headrace_things", "Things.", ["kind"], registry=registry).labels("good").inc(3)
    address = telemetry.serve_metrics("127.0.0.1:0", registry, "router")
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as answer:
        told = answer.read().decode()
    assert 'headrace_things_total{kind="good",role="router"} 3.0' in told
    assert "_created" not in told


def test_connections_that_never_ask_keep_nobody_from_the_metrics():
    address = telemetry.serve_metrics("127.0.0.1:0", CollectorRegistry(), "router")
    host, _, port = address.rpartition(":")
    silent = [socket.create_connection((host, int(port)), timeout=10) for _ in range(telemetry.MAX_SCRAPES + 5)]
    for closed in silent[:5]:
        assert closed.recv(1) == b""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        assert answer.status == 200
    for connection in silent:
        connection.close()


def test_scrapes_are_made_one_at_a_time():
    at_once, most = [], []

    class Slow(Collector):
        def collect(self):
            at_once.append(1)
            most.append(len(at_once))
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(0.05)
            at_once.pop()
            return []

    together = threading.Barrier(2)
    registry = CollectorRegistry()
    registry.register(Slow())
    address = telemetry.serve_metrics("127.0.0.1:0", registry, "router")
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: urllib.request.urlopen(f"http://{address}/", timeout=10).read(), range(4)))
    assert max(most) == 1


def test_a_metrics_address_in_use_is_named():
    address = telemetry.serve_metrics("127.0.0.1:0", CollectorRegistry(), "router")
    with pytest.raises(HeadraceError, match=address):
        telemetry.serve_metrics(address, CollectorRegistry(), "router")


def test_bucket_edges_rise():
    for edges in (telemetry.LATENCY_BUCKETS, telemetry.PHASE_BUCKETS):
        assert list(edges) == sorted(set(edges))
