"""Counters by reason are there before anything fails, and for just what the code that counts in them can raise."""

import pytest
from headrace_core.worker import metrics as worker
from headrace_core.worker.metrics import WorkerMetrics
from headrace_router import metrics as router
from headrace_router.metrics import Objectives, RouterMetrics
from prometheus_client import CollectorRegistry

from tests.unit.test_reasons import raised

DOOR = ["core/headrace_core/door.py", "core/headrace_core/authority.py"]
ADMISSION = [
    *DOOR, "core/headrace_core/request.py", "core/headrace_core/rpc.py",
    *(f"router_service/headrace_router/{name}.py" for name in (
        "requests/admission", "requests/dispatch", "requests/targets", "requests/waiting", "placement/capacity",
        "router", "callers/keys",
        "text/chat_renderer", "text/prompts", "text/size_lanes", "text/tokenizer",
    )),
]  # fmt: skip


def reasons(*places):
    """Return the reasons that product code at these places raises, but for what keeps a process from starting."""
    return {
        reason
        for name, reason, place in raised()
        if place.startswith(places) and name not in ("StartupError", "CheckpointError")
    }


def zeros(registry, name):
    """Return the reasons of a metric's samples, all of which are 0."""
    samples = [each for metric in registry.collect() for each in metric.samples if each.name == name]
    assert all(each.value == 0 for each in samples)
    return {each.labels["reason"] for each in samples}


@pytest.mark.parametrize(
    ("name", "known"),
    [("headrace_handoff_failures_total", worker.TRANSFER_REASONS), ("headrace_refused_calls_total", worker.REFUSALS)],
)
def test_a_worker_shows_them_before_anything_fails(name, known):
    registry = CollectorRegistry()
    WorkerMetrics(registry)
    assert zeros(registry, name) == set(known)


def test_a_router_shows_them_before_anything_is_refused():
    registry = RouterMetrics.create(Objectives()).registry
    assert zeros(registry, "headrace_refused_requests_total") == set(router.REFUSALS)


def test_a_hand_off_fails_with_what_its_code_raises():
    assert set(worker.TRANSFER_REASONS) == reasons("core/headrace_core/transfer/")


def test_a_worker_refuses_calls_with_what_its_door_raises():
    assert set(worker.REFUSALS) == reasons(*DOOR)


def test_a_router_refuses_requests_with_what_is_raised_before_they_are_placed():
    as_a_client = {"PROTOCOL"}  # in rpc.py, of a worker's answer
    assert set(router.REFUSALS) == reasons(*ADMISSION) - as_a_client
