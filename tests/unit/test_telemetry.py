import json
import logging
import urllib.request

import pytest
from headrace_core import telemetry
from headrace_core.errors import HeadraceError
from headrace_core.testing.async_test import WAIT_S
from prometheus_client import CollectorRegistry, Counter


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


def test_metrics_are_served():
    registry = CollectorRegistry()
    Counter("headrace_things", "Things.", registry=registry).inc(3)
    address = telemetry.serve_metrics("127.0.0.1:0", registry)
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as answer:
        assert b"headrace_things_total 3.0" in answer.read()


def test_a_metrics_address_in_use_is_named():
    address = telemetry.serve_metrics("127.0.0.1:0", CollectorRegistry())
    with pytest.raises(HeadraceError, match=address):
        telemetry.serve_metrics(address, CollectorRegistry())


def test_bucket_edges_rise():
    for edges in (telemetry.LATENCY_BUCKETS, telemetry.PHASE_BUCKETS):
        assert list(edges) == sorted(set(edges))
