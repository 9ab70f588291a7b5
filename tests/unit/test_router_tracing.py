"""What the router traces of a request, over real gRPC with fake workers and a real collector."""

import asyncio
import socket

import pytest
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import HandoffLostError
from headrace_core.testing.async_test import async_test
from headrace_core.testing.fake_model import FakeModel
from headrace_core.testing.otlp_collector import OtlpCollector
from headrace_core.testing.worker_pair import running
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService
from headrace_router.metrics import Objectives, RouterMetrics, TokenMetrics
from headrace_router.testing import (
    VOCAB_SIZE,
    RouterUnderTest,
    check_timings,
    remembering_worker,
    run_router,
    scripted_worker,
    text_request,
    wait_until,
)
from prometheus_client import generate_latest

from tests.unit.test_router_moves import ask, fleet, loaded, running_at
from tests.unit.test_router_samples import At

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
REQUEST = "text_completion tiny"


@pytest.fixture
def collector(monkeypatch):
    with OtlpCollector() as collector:
        for name, value in collector.environment.items():
            monkeypatch.setenv(name, value)
        yield collector


def request(num_tokens=3, **more):
    return text_request("a", include_timings=True, sampling={"max_tokens": num_tokens}, **more)


async def spans_of(collector, count=1):
    """Return all spans, once the requests' own, which end last, are so many."""
    await asyncio.to_thread(
        collector.wait, lambda spans: sum(span.name == REQUEST for span in spans) >= count, "the request's span"
    )
    return collector.spans


def named(spans, name):
    return sorted((span for span in spans if span.name == name), key=lambda span: span.start_ns)


@pytest.mark.parametrize("num_tokens", [2, 50])
def test_its_spans_are_the_phases_however_many_tokens_there_are(tmp_path, collector, num_tokens):
    async def test(router):
        (sample,) = await router.generate(request(num_tokens), traceparent=PARENT)
        spans = await spans_of(collector)
        assert {span.trace_id for span in spans} == {TRACE}
        phases = check_timings(sample.last)
        assert sorted(span.name for span in spans) == sorted([REQUEST, "attempt", *phases])
        (attempt,) = named(spans, "attempt")
        (start,) = router.workers[1].starts
        assert start.traceparent == f"00-{TRACE}-{attempt.span_id}-01"
        assert attempt.attributes["headrace.prefill_worker"] == router.workers[0].address

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test, trace_sample=0.0)


def test_workers_hear_of_no_trace_where_there_is_none(tmp_path, collector):
    async def test(router):
        await router.generate(request())
        assert [start.traceparent for start in router.workers[0].starts] == [""]

    run_router(tmp_path, [scripted_worker("both")], test, trace_sample=0.0)
    assert not collector.spans


def test_an_attempt_that_failed_says_why_and_the_next_one_is_linked_to_it(tmp_path, collector):
    async def test(router):
        router.workers[1].faults.join.append(HandoffLostError("STALE_ATTEMPT", "stale"))
        (sample,) = await router.generate(request())
        spans = await spans_of(collector)
        first, second = named(spans, "attempt")
        assert (first.error, second.error, second.links) == ("STALE_ATTEMPT", "", [first.span_id])
        assert [span.parent_id for span in named(spans, "queue")] == [first.span_id, second.span_id]
        assert [span.parent_id for span in named(spans, "retry")] == [first.span_id]
        (whole,) = named(spans, REQUEST)
        assert (whole.error, whole.attributes["headrace.outcome"]) == ("", "ok")
        assert whole.events == [("attempt failed", {"error.type": "STALE_ATTEMPT", "headrace.attempt": 1})]
        parts = [span for span in spans if span not in (first, second, whole)]
        assert sum(span.duration_us for span in parts) == sample.last.timings.total_us

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test, trace_sample=1.0)


def test_an_attempt_that_was_moved_is_no_failure(tmp_path, collector):
    async def test(router):
        _, *decodes = router.workers
        asked = ask(router)
        first, _ = await running_at(*decodes)
        first.drain()
        await asked
        spans = await spans_of(collector)
        moved, last = named(spans, "attempt")
        assert (moved.error, moved.attributes["headrace.is_moved"]) == ("", True)
        assert (last.links, last.attributes["headrace.is_moved"]) == ([moved.span_id], False)

    run_router(tmp_path, fleet("prefill", "decode", "decode"), test, trace_sample=1.0)


def test_where_a_request_was_that_ended_early_is_told(tmp_path, collector):
    async def test(router):
        (worker,) = router.workers
        worker.faults.step_gate.clear()
        running = asyncio.create_task(router.generate(request()))
        await wait_until(lambda: worker.starts)
        queued = asyncio.create_task(router.generate(request()))  # the worker takes one at a time
        await wait_until(lambda: router.service._router.num_queued == 1)
        queued.cancel()
        await wait_until(lambda: router.service._router.num_queued == 0)  # else it might run once the other has gone
        running.cancel()
        await asyncio.gather(running, queued, return_exceptions=True)
        at_worker, in_queue = named(await spans_of(collector, 2), REQUEST)
        assert at_worker.attributes["headrace.outcome"] == in_queue.attributes["headrace.outcome"] == "cancelled"
        (attempt,) = named(collector.spans, "attempt")
        (unfinished,) = named(collector.spans, "unfinished")
        assert (unfinished.parent_id, unfinished.end_ns) == (attempt.span_id, attempt.end_ns)
        queues = named(collector.spans, "queue")
        assert [queue.parent_id for queue in queues] == [attempt.span_id, in_queue.span_id]
        worker.faults.step_gate.set()

    run_router(tmp_path, [scripted_worker("both", max_step_sequences=1)], test, trace_sample=1.0)


def test_requests_are_answered_where_no_collector_is(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")

    async def test(router):
        for _ in range(5):
            (sample,) = await router.generate(request(50))
            assert sample.last.timings.num_attempts == 1

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test, trace_sample=1.0)


def test_requests_are_answered_while_a_collector_does_not_answer(tmp_path, collector):
    collector.may_answer.clear()

    async def test(router):
        await router.generate(request())
        await asyncio.to_thread(collector.wait, lambda _: collector.num_calls, "spans are on their way")
        (sample,) = await router.generate(request(50))
        assert len(sample.token_ids) == 50

    run_router(tmp_path, [scripted_worker("both")], test, trace_sample=1.0)
    assert not collector.may_answer.is_set()


@async_test
async def test_every_process_sends_what_is_left_when_it_stops(tmp_path, collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    workers = [
        service(settings(model=".", trace_sample=0.0), loader=lambda _: loaded(FakeModel(vocab_size=VOCAB_SIZE)))
        for service, settings in ((PrefillService, PrefillSettings), (DecodeService, DecodeSettings))
    ]
    async with running(*workers) as addresses:
        async with RouterUnderTest(tmp_path, settings={"trace_sample": 1.0}) as router:
            router.workers = [At(address) for address in addresses]
            router.write_workers()
            await router.wait_states(["ready", "ready"])
            await router.generate(request())
            router.workers.clear()
        assert {span.service for span in collector.spans} == {"headrace-router"}
    assert {span.name for span in collector.spans if span.service == "headrace-prefill"} >= {"lease", "held"}
    assert {span.name for span in collector.spans if span.service == "headrace-decode"} >= {"sequence", "running"}
    assert len({span.trace_id for span in collector.spans}) == 1


def test_tokens_are_counted_the_same_and_with_examples_only_where_there_is_a_trace():
    metrics = RouterMetrics.create(Objectives())
    assert metrics.tokens.traced("") is metrics.tokens
    traced = metrics.tokens.traced(TRACE)
    assert not isinstance(traced, TokenMetrics)
    traced.first(0.3, 1)
    traced.more(0.02, 2)
    assert metrics.registry.get_sample_value("headrace_output_tokens_total") == 3
    assert metrics.registry.get_sample_value("headrace_itl_seconds_count") == 2
    (family,) = (family for family in metrics.registry.collect() if family.name == "headrace_itl_seconds")
    (example,) = (sample.exemplar for sample in family.samples if sample.exemplar)
    assert (example.labels, example.value) == ({"trace_id": TRACE}, 0.01)
    assert TRACE not in generate_latest(metrics.registry).decode(), "text that is not OpenMetrics has no exemplars"
